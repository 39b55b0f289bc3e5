import torch

from dptrain.data import cache_features, load


def test_features_are_computed_once_and_gathered():
    train = load("digits").train
    calls = []

    def backbone(inputs):
        calls.append(len(inputs))
        return inputs.flatten(1)[:, :3] * 2

    features = cache_features(train, backbone, batch_size=500)
    assert sum(calls) == len(train) == len(features)
    assert features.input_shape == (3,)
    rows, labels = features.gather(torch.tensor([9, 4]))
    images, expected = train.gather(torch.tensor([9, 4]))
    assert torch.equal(rows, images.flatten(1)[:, :3] * 2)
    assert torch.equal(labels, expected)
    assert sum(calls) == len(train)

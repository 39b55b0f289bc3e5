import torch

from dptrain.data import Dataset, Preprocess, load


def test_split_is_fixed_stratified_and_complete():
    first, second = load("digits"), load("digits")
    assert len(first.train) + len(first.test) == 1797
    assert 0.19 < len(first.test) / 1797 < 0.21
    assert torch.equal(first.test.labels, second.test.labels)
    shares = first.test.labels.bincount() / (first.test.labels.bincount() + first.train.labels.bincount())
    assert shares.min() > 0.19 and shares.max() < 0.21


def test_gather_gives_normalised_images_in_the_order_asked_for():
    train = load("digits").train
    assert isinstance(train, Dataset)
    images, labels = train.gather(torch.tensor([5, 0, 5]))
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32
    assert torch.equal(images[0], images[2]) and labels[0] == labels[2] == train.labels[5]
    everything, _ = train.gather(torch.arange(len(train)))
    assert everything.min() == -1 and everything.max() == 1


def test_resizing_happens_on_the_way_out():
    train = load("digits", preprocess=Preprocess(image_size=28)).train
    assert train.input_shape == (1, 28, 28)
    assert train.gather(torch.arange(2))[0].shape == (2, 1, 28, 28)


def test_three_channel_normalisation_of_grey_images_is_averaged():
    preprocess = Preprocess(mean=(0.2, 0.4, 0.6), std=(0.5, 0.5, 0.5))
    images, _ = load("digits", preprocess=preprocess).train.gather(torch.arange(4))
    assert images.shape[1] == 1
    assert torch.isclose(images.min(), torch.tensor(-0.8))


def test_stream_equals_gather_and_a_subset_renumbers():
    train = load("digits").train
    batches = [torch.tensor([1, 2]), torch.tensor([7])]
    for (streamed, _), indices in zip(train.stream(iter(batches)), batches, strict=True):
        assert torch.equal(streamed, train.gather(indices)[0])
    part = train.subset(torch.tensor([10, 20, 30]))
    assert len(part) == 3
    assert torch.equal(part.gather(torch.tensor([1]))[0], train.gather(torch.tensor([20]))[0])

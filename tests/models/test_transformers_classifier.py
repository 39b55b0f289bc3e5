import pytest
import torch

from dptrain.models import ModelError, Text, build, build_with_report, preferences, select_trainable

transformers = pytest.importorskip("transformers")


def text(models, length=6):
    tokens = torch.tensor([[2, 5, 6, 3, 0, 0]])[:, :length]
    example = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    return Text(example, vocabulary=50, pad_token=0)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    config.save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3]
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
def test_a_classifier_of_texts_from_its_configuration(text_models, name):
    model = build(f"hf:{text_models / name}", 3, (6,), text=text(text_models))
    tokens = {key: value.repeat(2, 1) for key, value in text(text_models).example.items()}
    assert model(**tokens).logits.shape == (2, 3)
    assert next(model.parameters()).dtype == torch.float32


def test_the_head_of_a_transformers_model_is_all_but_the_base(text_models):
    model = build(f"hf:{text_models / 'distilbert'}", 3, (6,), text=text(text_models))
    names = select_trainable(model, "head").names
    assert {name.split(".")[0] for name in names} == {"pre_classifier", "classifier"}


def test_weights_are_loaded_and_what_is_new_is_reported(text_models):
    name = f"hf:{text_models / 'bert-weights'}"
    model, report = build_with_report(name, 3, (6,), pretrained=True, text=text(text_models))
    stored = transformers.BertModel.from_pretrained(text_models / "bert-weights")
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, stored.embeddings.word_embeddings.weight)
    assert report.reset == ("classifier.bias", "classifier.weight")
    assert "2 reset" in str(report)
    assert build_with_report(name, 3, (6,), text=text(text_models))[1] is None


def test_weights_of_another_model_are_refused(text_models, tmp_path):
    config = transformers.BertConfig.from_pretrained(text_models / "bert", num_hidden_layers=2)
    transformers.BertModel.from_pretrained(text_models / "bert-weights").save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="would stay random"):
        build(f"hf:{tmp_path}", 3, (6,), pretrained=True, text=text(text_models))


def test_what_does_not_fit_is_said(text_models, vit_folder, tmp_path):
    bert = f"hf:{text_models / 'bert'}"
    with pytest.raises(ModelError, match="transformers has no classifier of images"):
        build(bert, 3, (3, 32, 32))
    with pytest.raises(ModelError, match="transformers has no classifier of texts"):
        build(f"hf:{vit_folder}", 3, (6,), text=text(text_models))
    with pytest.raises(ModelError, match=r"There is no model 'hf:.*config\.json"):
        build(f"hf:{tmp_path}", 3, (6,), text=text(text_models))
    with pytest.raises(ModelError, match="give the one that belongs to it with --tokenizer"):
        build(bert, 3, (6,), text=Text(text(text_models).example, 10_000, 0))
    with pytest.raises(ModelError, match=r"cannot be loaded .* leave out --pretrained"):
        build(bert, 3, (6,), pretrained=True, text=text(text_models))
    with pytest.raises(ModelError, match="linear cannot read tokenised text"):
        build("linear", 3, (6,), text=text(text_models))
    with pytest.raises(ModelError, match="reads images"):
        build("vit-tiny", 3, (6,), text=text(text_models))


def test_a_classifier_of_images(vit_folder):
    wanted = preferences(f"hf:{vit_folder}")
    assert (wanted.image_size, wanted.mean, wanted.std) == (32, (0.1, 0.2, 0.3), (1, 2, 3))
    model = build(f"hf:{vit_folder}", 5, (1, 16, 16))
    assert model(torch.zeros(2, 1, 16, 16)).logits.shape == (2, 5)


def test_preferences_of_a_model_of_texts(text_models):
    wanted = preferences(f"hf:{text_models / 'gpt2'}")
    assert (wanted.tokenizer, wanted.max_length) == (str(text_models / "gpt2"), 16)

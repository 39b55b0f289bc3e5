import json
import shutil
import sys

import pytest
import torch

from dptrain.data import Columns, DataError, Preprocess, ResidentTexts, Tokenization, load

datasets = pytest.importorskip("datasets")

REVIEWS = Columns("review", "verdict")


def texts(path, models, columns=REVIEWS, length=None):
    return load(f"hf:{path}", columns=columns, tokenization=Tokenization(str(models / "bert"), length, 16))


def image_set(count=4, sizes=((8, 8),)):
    from PIL import Image

    rows = {
        "image": [Image.new("L", sizes[i % len(sizes)], 40 * i) for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["dark", "light", "none"])
    )
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_folder_of_csv_files(reviews_folder, text_models):
    splits = texts(reviews_folder, text_models)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (600, 100, 2)
    assert splits.input_shape == (16,) and splits.test_name == "test"
    tokens, labels = splits.train.gather(torch.tensor([3, 0]))
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (2, 16)
    assert {value.dtype for value in (*tokens.values(), labels)} == {torch.int64}
    text = splits.train.encoder._tokenizer.decode(tokens["input_ids"][0], skip_special_tokens=True)
    assert text.startswith("the ") and text.endswith(".")
    padded = tokens["attention_mask"] == 0
    assert (tokens["input_ids"][padded] == splits.train.encoder.pad_token).all()


def test_the_label_follows_its_text(reviews_folder, text_models):
    train = texts(reviews_folder, text_models).train
    raw = datasets.load_dataset(str(reviews_folder))["train"]
    assert train.labels.tolist() == [["bad", "good"].index(verdict) for verdict in raw["verdict"]]
    assert train.subset(torch.tensor([5, 7])).labels.tolist() == train.labels[[5, 7]].tolist()


def test_other_ways_to_keep_a_data_set(reviews_folder, text_models, tmp_path):
    raw = datasets.load_dataset(str(reviews_folder))
    raw.save_to_disk(tmp_path / "saved")
    raw["train"].save_to_disk(tmp_path / "one")
    raw["train"].to_parquet(tmp_path / "rows.parquet")
    raw["train"].to_json(tmp_path / "rows.jsonl")
    assert len(texts(tmp_path / "saved", text_models).test) == 100
    for name in ("one", "rows.parquet", "rows.jsonl"):
        splits = texts(tmp_path / name, text_models)
        assert len(splits.train) == 600 and splits.test is None


def test_texts_are_cut_to_the_length(reviews_folder, text_models):
    train = texts(reviews_folder, text_models, length=5).train
    tokens, _ = train.gather(torch.arange(10))
    assert tokens["input_ids"].shape == (10, 5) and tokens["attention_mask"].all()
    with pytest.raises(
        DataError, match="--max-length is 17, but the model and its tokenizer take at most 16"
    ):
        texts(reviews_folder, text_models, length=17)


def test_stand_ins_are_taken_from_no_text(reviews_folder, text_models, tmp_path):
    shutil.copy(reviews_folder / "test.csv", tmp_path / "train.csv")
    one, other = (texts(path, text_models).train for path in (reviews_folder, tmp_path))
    (first, labels), (second, _) = one.stand_in(20), other.stand_in(20)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(labels) == 20 and len(first["input_ids"].unique(dim=0)) == 16
    assert len(first["attention_mask"].sum(1).unique()) > 4


def test_pairs_of_texts(text_models, tmp_path):
    rows = [{"a": "the film was fine.", "b": "the film was dull.", "label": i % 2} for i in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "pairs")
    lengths = [
        texts(tmp_path / "pairs", text_models, Columns(columns)).train.gather(torch.arange(2))[0]
        for columns in ("a", "b", "a,b")
    ]
    one, other, both = (tokens["attention_mask"].sum(1) for tokens in lengths)
    assert (both > one).all() and (both > other).all()


def test_columns_are_guessed_where_there_is_one_choice(text_models, tmp_path):
    rows = {"number": [1, 2], "words": ["a film", "a book"], "kind": ["x", "y"]}
    features = datasets.Features(
        number=datasets.Value("int64"),
        words=datasets.Value("string"),
        kind=datasets.ClassLabel(names=["x", "y"]),
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "clear")
    assert len(texts(tmp_path / "clear", text_models, Columns()).train) == 2


def test_withheld_labels_are_passed_over(text_models, tmp_path):
    rows = [{"text": "the film", "label": 0}, {"text": "the book", "label": 1}]
    hidden = [{"text": "the film", "label": -1}]
    splits = {"train": rows, "validation": rows, "test": hidden}
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(num_classes=2))
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part, features=features) for name, part in splits.items()}
    ).save_to_disk(tmp_path / "glue")
    found = texts(tmp_path / "glue", text_models, Columns())
    assert (found.test_name, len(found.test)) == ("validation", 2)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"a": "x", "b": "y", "label": i} for i in (0, 1)], Columns(), "--text-column, one of a, b, label"),
        ([{"text": "x", "one": 0, "two": 1}], Columns(), "--label-column, one of text, one, two"),
        ([{"text": "x", "label": i} for i in (0, 1)], Columns("txt"), "no column 'txt'; give --text-column"),
        ([{"text": "x", "label": 0}], Columns(None, "y"), "no column 'y'; give --label-column"),
        ([{"text": "x", "label": 0.5}, {"text": "x", "label": 1.5}], Columns(), "are not classes"),
        ([{"text": "x", "label": 1}], Columns(), "all labels in label are the same"),
        ([{"text": "x", "label": 1}, {"text": None, "label": 0}], Columns(), "does not hold a text in every"),
        ([{"n": 3, "label": 1}, {"n": 4, "label": 0}], Columns("n"), "does not hold a text in every"),
    ],
)
def test_what_is_unclear_or_wrong_is_said(text_models, tmp_path, rows, columns, message):
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "rows", text_models, columns)


def test_what_cannot_be_read_is_said(reviews_folder, text_models, tmp_path):
    (tmp_path / "notes.doc").write_text("?")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of \.csv"):
        texts(tmp_path / "notes.doc", text_models)
    with pytest.raises(DataError, match="cannot be read"):
        texts(tmp_path / "empty", text_models)
    with pytest.raises(DataError, match=r"cannot be read .* give a name on the Hugging Face hub"):
        load("hf:no-such-data-set")
    with pytest.raises(DataError, match="give a --tokenizer"):
        load(f"hf:{reviews_folder}", columns=REVIEWS)
    with pytest.raises(DataError, match="There is no tokenizer"):
        load(f"hf:{reviews_folder}", columns=REVIEWS, tokenization=Tokenization(str(tmp_path)))
    (tmp_path / "train.json").write_text(json.dumps([{"text": "x", "label": 0}]))
    datasets.DatasetDict({"half": image_set()}).save_to_disk(tmp_path / "half")
    with pytest.raises(DataError, match="no split train, only half"):
        load(f"hf:{tmp_path / 'half'}")


def test_without_the_library_the_sentence_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'dptrain\[transformers\]'"):
        load(f"hf:{tmp_path}")


def test_images_of_one_size_stay_as_they_are(tmp_path):
    datasets.DatasetDict(train=image_set(), test=image_set(2)).save_to_disk(tmp_path / "images")
    splits = load(f"hf:{tmp_path / 'images'}", preprocess=Preprocess(image_size=16))
    assert (splits.num_classes, splits.input_shape, len(splits.test)) == (3, (1, 16, 16), 2)
    assert not isinstance(splits.train, ResidentTexts)
    images, labels = splits.train.gather(torch.tensor([0, 3]))
    assert images.shape == (2, 1, 16, 16) and labels.tolist() == [0, 1]
    assert images[0].max() == -1 and images[1].std() < 1e-6


def test_images_of_several_sizes_are_cut_and_resized(tmp_path):
    image_set(sizes=((8, 10), (12, 6))).save_to_disk(tmp_path / "images")
    train = load(f"hf:{tmp_path / 'images'}", preprocess=Preprocess(image_size=4)).train
    assert train.gather(torch.arange(4))[0].shape == (4, 1, 4, 4)

"""Labelled text: what is read, what is refused and how the refusal reads."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from millibert import UsageError
from millibert_build.dataset import load_examples, load_splits, stratified, target_matrix
from millibert_build.scenario import Data

NLUPP = Path(__file__).parents[2] / "shared" / "data" / "nlupp" / "banking"
BANKING77 = Path(__file__).parents[2] / "shared" / "data" / "banking77"


@pytest.fixture
def write(tmp_path):
    def _write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return _write


def load(source: str, text: str = "text", label: str = "label", problem="single_label"):
    data = Data(train=source, test=source, text_column=text, label_column=label)
    return load_examples(source, "train", data, problem)


def splits(train, test, labels=None, problem="single_label", **data):
    return load_splits(Data(train=train, test=test, seed=1, **data), labels, problem)


def rows(*examples: tuple[str, str]) -> str:
    return "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in examples)


TRAIN = rows(*((f"{label} number {i}", label) for label in "ab" for i in range(10)))


def test_csv_keeps_text_label_and_line(write):
    path = write("data.csv", 'label,text\nx,"two\nlines, one text"\ny,näxt\n')
    first, second = load(path)
    assert (first.text, first.labels[0], first.line) == ("two\nlines, one text", "x", 2)
    assert (second.text, second.labels[0], second.line) == ("näxt", "y", 4)
    assert second.place == f"{path}:4"


def test_csv_reads_a_byte_order_mark_and_windows_line_ends(write):
    examples = load(write("data.csv", b"\xef\xbb\xbftext,label\r\none,a\r\ntwo,b\r\n"))
    assert [(e.text, e.labels[0]) for e in examples] == [("one", "a"), ("two", "b")]


def test_a_line_separator_inside_a_text_does_not_split_it(write):
    (example,) = load(write("data.csv", "text,label\none\u2028text\x85here,a\n"))
    assert example.text == "one\u2028text\x85here"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_examples(suffix, write, tmp_path):
    records = [{"utterance": "hello, there", "intent": "greet"}, {"utterance": "bye 👋", "intent": "part"}]
    if suffix == "parquet":
        parquet(tmp_path / "data.parquet", records)
        path = str(tmp_path / "data.parquet")
    elif suffix == "jsonl":
        path = write("data.jsonl", "\n".join(json.dumps(r) for r in records) + "\n\n")
    else:
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        lines = [mark.join(f'"{v}"' for v in row) for row in (records[0], *(r.values() for r in records))]
        path = write(f"data.{suffix}", "\n".join(lines))
    examples = load(path, "utterance", "intent")
    assert [(e.text, e.labels[0]) for e in examples] == [("hello, there", "greet"), ("bye 👋", "part")]


def parquet(path: Path, records: list[dict], features: dict | None = None) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(records)
    if features:
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path)


def test_parquet_class_labels_get_their_names(tmp_path):
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    parquet(tmp_path / "a.parquet", [{"text": "sure", "label": 1}, {"text": "never", "label": 0}], features)
    assert [e.labels[0] for e in load(str(tmp_path / "a.parquet"))] == ["yes", "no"]


def test_parquet_without_label_names_is_refused(tmp_path):
    parquet(tmp_path / "a.parquet", [{"text": "sure", "label": 1}])
    with pytest.raises(UsageError, match=r"a\.parquet:1: column 'label' holds int, not text"):
        load(str(tmp_path / "a.parquet"))


def test_a_folder_holds_one_file_per_split(write, tmp_path):
    write("train.csv", TRAIN)
    write("test.jsonl", '{"text": "a thing", "label": "a"}\n')
    found = splits(str(tmp_path), str(tmp_path))
    assert [e.text for e in found.test] == ["a thing"]
    with pytest.raises(UsageError, match=r"expected exactly one of validation\.csv"):
        splits(str(tmp_path), str(tmp_path), validation=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,intent\nhello,a\n", r"bad\.csv:2: no column 'label'; it has 'text', 'intent'"),
        ("", r"bad\.csv:1: no header"),
        ("text,label\n", r"bad\.csv: no examples"),
        ("text,label\nhello, you,a\n", r"bad\.csv:2: more cells than the header has"),
        ("text,label\nhello,a\n  ,a\n", r"bad\.csv:3: empty 'text'"),
        ("text,label\nhello,\n", r"bad\.csv:2: empty 'label'"),
        ("text,label\nhello\n", r"bad\.csv:2: no value in column 'label'"),
        ('text,label\n"hello,a\n', r"bad\.csv:2: not valid CSV"),
        (b"text,label\nfine,a\ncaf\xe9,a\n", r"bad\.csv:3: not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_a_bad_csv_names_file_line_and_reason(write, content, message):
    with pytest.raises(UsageError, match=message):
        load(write("bad.csv", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x", "label": "a"}\n{"text": }\n', r"bad\.jsonl:2: not valid JSON"),
        ('["x", "a"]\n', r"bad\.jsonl:1: a JSON object is expected, not list"),
        ('{"text": "x"}\n', r"bad\.jsonl:1: no column 'label'; it has 'text'"),
        ('{"text": 7, "label": "a"}\n', r"bad\.jsonl:1: column 'text' holds int, not text"),
    ],
)
def test_bad_jsonl_names_file_line_and_reason(write, content, message):
    with pytest.raises(UsageError, match=message):
        load(write("bad.jsonl", content))


def test_many_problems_are_counted_not_listed(write):
    with pytest.raises(UsageError) as caught:
        load(write("bad.csv", "text,label\n" + ",a\n" * 20))
    assert str(caught.value).count("empty 'text'") == 5
    assert "15 more such problems" in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("no.csv", "no such file"), ("a.xlsx", r"cannot read \.xlsx")])
def test_an_unreadable_source_is_refused(write, tmp_path, name, message):
    if name == "a.xlsx":
        write(name, "")
    with pytest.raises(UsageError, match=message):
        load(str(tmp_path / name))


def test_one_class_only(write):
    with pytest.raises(UsageError, match=r"train\.csv: only one class, 'a'"):
        splits(write("train.csv", rows(("x", "a"), ("y", "a"))), write("test.csv", rows(("z", "a"))))


def test_a_test_label_that_training_does_not_know(write):
    with pytest.raises(UsageError, match=r"test\.csv:3: unknown label 'c' \(not among the 2 known labels\)"):
        splits(write("train.csv", TRAIN), write("test.csv", rows(("fine", "a"), ("other", "c"))))


def test_a_training_label_that_the_scenario_does_not_list(write):
    with pytest.raises(UsageError, match=r"train\.csv:12: unknown label 'b'"):
        splits(write("train.csv", TRAIN), write("test.csv", rows(("t", "a"))), labels=("a", "z"))


def test_the_same_text_in_two_splits_is_refused_with_both_places(write):
    test = write("test.csv", rows(("new", "a"), ("b number 3", "b")))
    with pytest.raises(UsageError, match=r"test\.csv:3: the same text is in the train data \(.*train\.csv:15\)"):
        splits(write("train.csv", TRAIN), test)


def test_copies_can_be_left_out_of_training_instead(write):
    test = write("test.csv", rows(("new", "a"), ("b number 3", "b")))
    found = splits(write("train.csv", TRAIN), test, copies="drop")
    assert "b number 3" not in {e.text for e in (*found.train, *found.validation)}
    assert found.warnings == ("1 training texts left out: the held-out data have them too",)


def test_copies_of_test_texts_are_left_out_of_the_validation_data_too(write):
    validation = write("validation.csv", rows(("new", "a"), ("b number 3", "b"), ("kept", "a")))
    test = write("test.csv", rows(("new", "a"), ("b number 4", "b")))
    with pytest.raises(UsageError, match=r"the same text is in the (train|validation) data"):
        splits(write("train.csv", TRAIN), test, validation=validation)
    found = splits(write("train.csv", TRAIN), test, validation=validation, copies="drop")
    assert [e.text for e in found.validation] == ["b number 3", "kept"]
    assert len(found.test) == 2  # whatever is left out, the figures are of the whole test
    assert len(found.train) == 18
    assert found.warnings == (
        "2 training texts left out: the held-out data have them too",
        "1 validation texts left out: the test data have them too",
    )


def test_data_that_are_nothing_but_copies_are_refused(write):
    train, test = write("train.csv", TRAIN), write("test.csv", TRAIN)
    with pytest.raises(UsageError, match=r"train\.csv: nothing is left of the training data"):
        splits(train, test, copies="drop")


def test_a_text_that_training_repeats_is_not_validated_on(write):
    twice = TRAIN + TRAIN.partition("\n")[2]
    found = splits(write("train.csv", twice), write("test.csv", rows(("t", "a"))), validation_share=0.2)
    assert not {e.text for e in found.train} & {e.text for e in found.validation}
    assert found.validation
    assert "validation texts left out: the training data repeat them" in found.warnings[0]


def test_data_with_nothing_to_hold_out_are_refused(write):
    with pytest.raises(UsageError, match=r"train\.csv: too few different texts to hold any out"):
        splits(write("train.csv", rows(("x", "a"), ("y", "b"))), write("test.csv", rows(("t", "a"))))


def test_several_files_and_wildcards_are_read_in_order(write, tmp_path):
    for number in range(3):
        write(f"part{number}.csv", rows((f"text {number}", "a")))
    found = load(str(tmp_path / "part[0-1].csv"))
    assert [(e.text, e.line) for e in found] == [("text 0", 2), ("text 1", 2)]
    both = (str(tmp_path / "part2.csv"), str(tmp_path / "part0.csv"))
    assert [e.text for e in load_examples(both, "train", Data(train="", test=""), "single_label")] == [
        "text 2",
        "text 0",
    ]
    with pytest.raises(UsageError, match="no such file or folder"):
        load(str(tmp_path / "other*.csv"))


JSON = """[
  {"text": "one", "intents": ["a", "b", "a"]},
  {"text": "two"},
  {"text": "three", "intents": []}
]
"""


def test_a_json_array_gives_each_text_its_labels_and_line(write):
    found = load(write("data.json", JSON), label="intents", problem="multi_label")
    assert [(e.text, e.labels, e.line) for e in found] == [("one", ("a", "b"), 2), ("two", (), 3), ("three", (), 4)]


def test_labels_in_one_field_are_separated(write):
    found = load(write("data.csv", rows(("one", "a|b"), ("two", ""))), problem="multi_label")
    assert [e.labels for e in found] == [("a", "b"), ()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}', r"bad\.json:1: a JSON array of objects is expected"),
        ('[{"text": "x", "label": [1]}]', r"bad\.json:1: column 'label' holds \[1\], not labels"),
        ('[\n{"text": "x"},\n7]', r"bad\.json:3: a JSON object is expected, not int"),
        ('[\n{"text": "x"}\n{"text": "y"}]', r"bad\.json:3: not valid JSON: expected ',' or '\]'"),
        ('[\n{"text": "x"},\n{"text" "y"}]', r"bad\.json:3: not valid JSON"),
        ('[{"text": "x"}', r"bad\.json:1: not valid JSON"),
        ('[\n{"text": "x"},\n]', r"bad\.json:3: not valid JSON: no entry after the last ','"),
        ('[{"text": "x"}]\n\n[{"text": "y"}]', r"bad\.json:3: not valid JSON: more behind the array"),
        ('[{"text": "x"}]', r"bad\.json: no record has a column 'label'"),
    ],
)
def test_bad_json_names_file_line_and_reason(write, content, message):
    with pytest.raises(UsageError, match=message):
        load(write("bad.json", content), problem="multi_label")


def test_every_label_of_a_multi_label_set_is_held_out_in_proportion(write):
    generator = random.Random(0)
    texts = [
        {"text": f"text {n}", "label": [label for i, label in enumerate("abcd") if generator.random() < 0.5 / (i + 1)]}
        for n in range(400)
    ]
    examples = load(write("data.json", json.dumps(texts)), problem="multi_label")
    kept, held = stratified(examples, 0.2, seed=1)
    assert sorted(e.text for e in (*kept, *held)) == sorted(e.text for e in examples)
    everywhere, out = (Counter(label for e in part for label in e.labels or ("",)) for part in (examples, held))
    for label, count in everywhere.items():
        assert out[label] / count == pytest.approx(0.2, abs=0.08), label


@pytest.mark.parametrize("seed", range(20))
def test_no_label_of_a_multi_label_set_loses_its_last_training_text(write, seed):
    # x and y are as rare as z, and taking a text for each of them could take both texts of z.
    labels = ["xz", "yz", "x", "y", "q", "q", "q"]
    texts = [{"text": str(n), "label": list(each)} for n, each in enumerate(labels)]
    kept, held = stratified(load(write("data.json", json.dumps(texts)), problem="multi_label"), 0.2, seed)
    assert {label for e in kept for label in e.labels} == set("xyzq")
    assert held


def test_out_of_scope_texts_need_no_label(write):
    train, test = write("train.csv", TRAIN), write("test.csv", rows(("t", "a")))
    found = splits(train, test, out_of_scope=write("outside.csv", "text\nwhat is love\n"))
    assert found.out_of_scope == ("what is love",)
    with pytest.raises(UsageError, match=r"blank\.csv:2: empty 'text'"):
        splits(train, test, out_of_scope=write("blank.csv", 'text,x\n" ",1\n'))


def test_targets_are_multi_hot(write):
    examples = load(write("data.csv", rows(("one", "b|a"), ("two", ""))), problem="multi_label")
    assert target_matrix(examples, ("a", "b", "c")).tolist() == [[1, 1, 0], [0, 0, 0]]


@pytest.mark.skipif(not NLUPP.is_dir(), reason="NLU++ is not on this machine")
def test_nlupp_loads():
    train = (str(NLUPP / "fold[0-9].json"), str(NLUPP / "fold1[0-5].json"))
    source = {"train": train, "test": str(NLUPP / "fold1[6-9].json"), "label_column": "intents"}
    with pytest.raises(UsageError, match="the same text is in the train data"):
        splits(**source, problem="multi_label")
    found = splits(**source, problem="multi_label", copies="drop")
    assert len(found.labels) == 48
    assert len(found.test) == 413
    assert {label for e in found.train for label in e.labels} == set(found.labels)
    assert not {e.text for e in found.train} & {e.text for e in (*found.validation, *found.test)}


@pytest.mark.skipif(not NLUPP.is_dir(), reason="NLU++ is not on this machine")
def test_nlupp_folds_can_be_validation_data():
    train = (str(NLUPP / "fold[0-9].json"), str(NLUPP / "fold1[0-3].json"))
    found = splits(
        train,
        str(NLUPP / "fold1[6-9].json"),
        validation=str(NLUPP / "fold1[4-5].json"),
        label_column="intents",
        problem="multi_label",
        copies="drop",
    )
    assert (len(found.validation), len(found.test)) == (207, 413)


def test_a_training_text_that_differs_in_case_and_space_is_left_out_with_a_warning(write):
    test = write("test.csv", rows(("B  Number 3 ", "b")))
    found = splits(write("train.csv", TRAIN), test)
    kept = [e.text for e in (*found.train, *found.validation)]
    assert "b number 3" not in kept
    assert len(kept) == 19
    assert "1 training texts left out" in found.warnings[0]


def test_validation_is_split_off_by_label_and_by_seed(write):
    examples = load(write("train.csv", TRAIN))
    kept, held = stratified(examples, 0.2, seed=3)
    assert Counter(e.labels[0] for e in held) == {"a": 2, "b": 2}
    assert sorted(e.text for e in (*kept, *held)) == sorted(e.text for e in examples)
    assert stratified(examples, 0.2, seed=3) == (kept, held)
    assert stratified(examples, 0.2, seed=4) != (kept, held)


def test_a_label_with_one_text_stays_in_training(write):
    examples = load(write("train.csv", TRAIN + '"lonely",c\n'))
    kept, held = stratified(examples, 0.2, seed=3)
    assert "c" in {e.labels[0] for e in kept}
    assert "c" not in {e.labels[0] for e in held}


def test_labels_are_sorted_or_as_given(write):
    train, test = write("train.csv", TRAIN), write("test.csv", rows(("t", "a")))
    assert splits(train, test).labels == ("a", "b")
    assert splits(train, test, labels=("b", "a")).labels == ("b", "a")


def test_the_hash_follows_content(write):
    train, test = write("train.csv", TRAIN), write("test.csv", rows(("t", "a")))
    one = splits(train, test).sha256()
    assert splits(train, test).sha256() == one
    assert splits(train, write("test.csv", rows(("t", "b")))).sha256() != one


@pytest.mark.skipif(not BANKING77.is_dir(), reason="Banking77 is not on this machine")
def test_banking77_loads():
    source = {"train": str(BANKING77 / "train.csv"), "test": str(BANKING77 / "test.csv")}
    found = splits(**source, label_column="category")
    assert len(found.labels) == 77
    assert len(found.test) == 3080
    # Seven training texts equal a test text but for case and white space.
    assert len(found.train) + len(found.validation) == 10003 - 7

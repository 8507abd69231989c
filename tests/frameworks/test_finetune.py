"""`lopt bench finetune` on a tiny transformer and texts that one word tells apart."""

import random
from pathlib import Path

import pytest

from lopt import cli
from lopt.bench import finetune

transformers = pytest.importorskip("transformers", reason="pip install transformers")

WORDS = ("stone", "river", "cloud", "grass")


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name a pretrained model and texts; few are held back."""
    monkeypatch.setattr(finetune, "TEST", 100)
    folder, rng = tmp_path / "model", random.Random(0)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefgh")))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.BertConfig(**sizes, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(folder)
    texts = [f"about {word}\t{word} {' '.join(rng.choices('abcdefgh', k=5))}" for word in WORDS for _ in range(100)]
    (tmp_path / "texts.tsv").write_text("\n".join(texts))
    options = ["--model", str(folder), "--texts", str(tmp_path / "texts.tsv"), "--batch-size", "8", "--threads", "1"]
    return ["bench", "finetune", *options]


def test_hrnn_and_adamw_learn_what_the_texts_are_about(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*given, "--steps", "150", "--rates", "0.003"]) == 0
    said = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in said.splitlines()[2:]}
    assert set(rows) == {"HRNN", "HRNN, cooldown", "AdamW, 0.003"}
    for loss, test, accuracy, *_ in rows.values():
        assert float(loss) < 1.2 and float(test) < 1.2 and float(accuracy) > 40  # ln 4 = 1.39 and 25 % by chance


@pytest.mark.parametrize(
    ("content", "message"),
    [("stone only\n", "has no tab between a label and a text"), ("a\tb\nc\td\n", "2 texts in 2 classes are too few")],
)
def test_texts_that_cannot_be_used_are_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "texts.tsv").write_text(content)
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err

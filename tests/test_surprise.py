"""internals/surprise.py: the surprise at a text is that of transformers, and whole characters are shown."""

import math

import pytest
import torch
from conftest import run_script
from generating import BYTES
from pages import TEXT, rows
from torch.nn import functional as F

from internals.checkpoint import load_model
from internals.surprise import Surprise, read_off, readable, surprise, token_columns, token_texts
from internals.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("quick")


def test_surprises_are_those_of_transformers_on_the_export(run, tmp_path):
    """The text is longer than the context: each window but the first begins half a context earlier."""
    transformers = pytest.importorskip("transformers")
    exported = run_script("export.py", "--checkpoint", run / "last.pt", "--out-dir", tmp_path / "export")
    assert exported.returncode == 0, exported.stderr
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    model, _, _ = load_model(run / "last.pt")
    ids, block_size = list(TEXT.encode())[:101], model.config.block_size
    ours = surprise(model, ids)
    begin, predicted, log_p = 0, 1, []  # the rule: a full context keeps its newest half
    while predicted < len(ids):
        window = ids[begin : begin + block_size]
        with torch.no_grad():
            logits = reference(torch.tensor([window])).logits[0, predicted - begin - 1 :]
        log_p.append(logits.log_softmax(-1))
        predicted = begin + len(window) + 1
        begin = predicted - block_size // 2
    log_p = torch.cat(log_p)[: len(ids) - 1]
    nats = F.nll_loss(log_p, torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(ours.bits * math.log(2), nats, atol=2e-5, rtol=2e-5)
    p = log_p.exp().scatter(1, torch.tensor(ids[1:])[:, None], 0)
    torch.testing.assert_close(ours.p, p.topk(3).values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(p.gather(1, ours.ids), ours.p, atol=1e-5, rtol=1e-4)

    # Within one window their mean is the loss of training and evaluation
    window = torch.tensor([ids[: block_size + 1]])
    with torch.no_grad():
        loss = model(window[:, :-1], window[:, 1:])
    assert surprise(model, window[0].tolist()).bits.mean().item() * math.log(2) == pytest.approx(loss.item(), abs=1e-5)


def test_the_rows_of_a_run_are_the_surprise_of_its_checkpoint(run, text_data):
    model, tokenizer, saved = load_model(run / "last.pt")
    row = rows(run)[-1]
    assert row["iter"] == saved["iter"]
    passage = list(TEXT.encode())[: len(row["passage"]["bits"])]
    assert 250 < len(passage) <= 257 and bytes(passage).decode() == "".join(row["passage"]["text"])
    assert row["passage"] == token_columns(tokenizer, passage, [surprise(model, passage)])
    bits = row["passage"]["bits"][1:]
    assert row["passage"]["bits_per_byte"] == pytest.approx(sum(bits) / len(bits), abs=1e-3)  # a token is a byte here


def test_surprise_leaves_the_model_and_the_random_numbers(run):
    model, _, _ = load_model(run / "last.pt")
    model.train()
    before = torch.get_rng_state()
    one, two = surprise(model, list(range(40))), surprise(model, list(range(40)))
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.bits, two.bits)  # without dropout


def test_alternatives_are_the_other_tokens():
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0]])
    p = logits.softmax(-1)[0]
    likeliest, third = read_off(logits, torch.tensor([0])), read_off(logits, torch.tensor([3]))
    assert likeliest.ids.tolist() == [[2, 3, 1]] and third.ids.tolist() == [[0, 2, 1]]
    assert third.bits.item() == pytest.approx(-math.log2(p[3])) and third.p[0, 0].item() == pytest.approx(p[0].item())


def test_characters_that_tokens_cut_are_shown_whole():
    tokenizer = load_tokenizer("bytes")
    text = "é三🦉!"
    texts = token_texts(tokenizer, list(text.encode()))
    assert texts == ["", "é", "", "", "三", "", "", "", "🦉", "!"]
    assert token_texts(tokenizer, [0xC3, 0x41, 0xF0, 0x9F]) == [
        "",
        "\ufffdA",
        "",
        "\ufffd",
    ]  # not UTF-8: nothing is lost
    assert (
        readable(b"\xf0\x9f\xa6", b"\x89") == "🦉"
        and readable(b"\xc3", b" ") == " "
        and readable(b"", b"\xe4\xb8") == "<E4 B8>"
    )


def test_end_of_text_has_no_bytes():
    rows = Surprise(torch.tensor([3.0, 5.0]), torch.tensor([[1], [1]]), torch.tensor([[0.5], [0.5]]))
    assert token_columns(BYTES, [65, BYTES.eot_token, 66], [rows])["bits_per_byte"] == 8.0  # one byte follows the first

"""generate.py --html: probabilities and attention are the model's; no other file is replaced."""

import base64
import os
import re
import shutil

import pytest
import torch
from conftest import REPO, assert_user_error, run_script
from pages import TEXT, parsed
from torch.nn import functional as F

import generate
from config import GenerateConfig
from internals import html_text
from internals.checkpoint import load_model
from internals.html_text import TextPage, attention_weights
from internals.start import UserError
from internals.surprise import surprise
from model import CausalSelfAttention

pytestmark = pytest.mark.usefixtures("quick")


# ----------------------------------------------------------------------------------------------------------------------
# Contents


def test_a_continuation_has_the_probabilities_it_was_drawn_from(run, tmp_path):
    """Greedy in float32: at every place of the continuation, no token is likelier than the chosen one."""
    path = tmp_path / "text.html"
    options = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--temperature",
        "0",
        "--ignore-eot",
        "--max-new-tokens",
        "60",
        "--num-samples",
        "2",
    ]
    result = run_script(
        "generate.py", "--checkpoint", run, "--prompt", TEXT[:30], *options, "--html", path, "--seed", "7"
    )
    assert result.returncode == 0, result.stderr
    page = parsed(path)
    for view in page.data["views"]:
        assert "".join(view["passage"]["text"]) == result.stdout.split("\n" + TEXT[:30])[0].rstrip("\n")
        new = list(zip(view["passage"]["bits"], view["passage"]["alternatives"], strict=True))[
            len(TEXT[:30].encode()) :
        ]
        assert len(new) == 60 and all(2**-bits >= others[0][1] - 1e-4 for bits, others in new)
    assert "temperature 0: always the likeliest token" in page.text and "sample 2 of 2" in str(page.data)
    plain = run_script("generate.py", "--checkpoint", run, "--prompt", TEXT[:30], *options, "--seed", "7")
    assert plain.stdout == result.stdout


def test_a_prompt_alone_is_measured(run, tmp_path):
    path = tmp_path / "text.html"
    result = run_script(
        "generate.py", "--checkpoint", run, "--device", "cpu", "--prompt", TEXT[:90], "--max-new-tokens", "0", "--html", path
    )  # fmt: skip
    assert result.returncode == 0 and "reads the last" not in result.stderr, result.stderr
    model, _, _ = load_model(run / "best.pt")
    (view,) = parsed(path).data["views"]
    bits = surprise(model, list(TEXT[:90].encode())).bits
    assert view["passage"]["bits"][1:] == [round(value, 3) for value in bits.tolist()]


def test_attention_is_the_models(run):
    """Compared with transformers, which returns attention on request."""
    model, tokenizer, _ = load_model(run / "last.pt")
    ids = list(TEXT.encode())[: model.config.block_size]
    weights = attention_weights(model, ids)
    assert weights.shape == (2, 2, len(ids), len(ids))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, len(ids)))
    assert weights.triu(1).abs().max() == 0
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_inner=32, n_positions=16, vocab_size=257)
    config._attn_implementation = "eager"
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = {
        name: tensor.T if re.search(r"c_(attn|proj|fc)\.weight", name) else tensor
        for name, tensor in model.state_dict().items()
    }
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:257]
    missing = theirs.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    with torch.no_grad():
        expected = torch.stack(theirs(torch.tensor([ids]), output_attentions=True).attentions)[:, 0]
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)

    page = TextPage(str(REPO / "unused.html"), model, tokenizer, torch.device("cpu"), "")
    packed = page.attention(ids)["weights"]
    n = len(ids)
    for layer in range(2):
        for head in range(2):
            values = torch.tensor(list(base64.b64decode(packed[layer][head])), dtype=torch.float32) / 255
            square = torch.zeros(n, n)
            square[tuple(torch.tril_indices(n, n))] = values
            torch.testing.assert_close(square, expected[layer, head], atol=0.003, rtol=0)


def test_attention_is_that_of_a_changed_model_too(run, monkeypatch):
    """Here all keys are equal and a token sees two others at most, so it looks at each as much as at itself."""

    def changed(self, x, cache=None, layer=0):
        q, _, v = self.c_attn(x).view(*x.shape[:2], 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        near = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril().triu(-2)
        y = F.scaled_dot_product_attention(q, torch.zeros_like(q), v, attn_mask=near)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))

    monkeypatch.setattr(CausalSelfAttention, "forward", changed)
    model, _, _ = load_model(run / "last.pt")
    weights = attention_weights(model, list(TEXT.encode())[:9])
    expected = torch.ones(9, 9).tril().triu(-2)
    torch.testing.assert_close(weights, (expected / expected.sum(1, keepdim=True)).expand(2, 2, 9, 9))


def test_the_prompt_of_several_samples_is_measured_once(run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(html_text, "surprise", lambda model, ids: (calls.append(len(ids)), surprise(model, ids))[1])
    model, tokenizer, _ = load_model(run / "last.pt")
    page = TextPage(str(tmp_path / "page.html"), model, tokenizer, torch.device("cpu"), "")
    prompt, samples = list(TEXT.encode())[:10], [[65, 66], [67], [68, 69, 70]]
    page.write("", prompt, samples)
    assert calls == [10, 12, 11, 13]
    for view, sample in zip(parsed(tmp_path / "page.html").data["views"], samples, strict=True):
        known = surprise(model, [*prompt, *sample]).bits.tolist()
        assert view["passage"]["bits"][1:] == pytest.approx(known, abs=2e-3)


def test_texts_are_not_said_to_be_english(run, tmp_path):
    model, tokenizer, _ = load_model(run / "last.pt")
    TextPage(str(tmp_path / "page.html"), model, tokenizer, torch.device("cpu"), "").write("", list(b"Ein"), [[]])
    tags = parsed(tmp_path / "page.html").tags
    texts = [attributes for tag, attributes in tags if tag == "h1" or attributes.get("id") in ("passage", "looks")]
    assert [(attributes["lang"], attributes["translate"]) for attributes in texts] == [("", "no")] * 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("The history\n of  it", "The history of it"),
        ("<|endoftext|>Newton\n\nWas", "Newton Was"),
        ("中" * 60, "中" * 44 + "…"),
        ("a" * 45, "a" * 45),
        ("<|endoftext|>", "A text"),
    ],
)
def test_the_heading_is_the_beginning_of_the_text(text, shown):
    assert html_text.heading(text) == shown


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_page_with_nowhere_to_go_is_refused_before_the_model_is_opened(tmp_path, monkeypatch):
    places = {
        tmp_path / "none" / "x.html": "there is no folder",
        tmp_path: "is a folder",
        tmp_path / "link.html": "is a link",  # to a file that is not there now: the page would take its place
        tmp_path / f"{'x' * 300}.html": "cannot be read (File name too long)",
        tmp_path / ("x" * 300) / "x.html": "cannot be read (File name too long)",
    }
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere.html")
    for path, words in places.items():
        with pytest.raises(UserError) as caught:
            html_text.check_page_path(str(path))
        assert str(caught.value).startswith(f"--html {path}: ") and words in str(caught.value)
    result = run_script("generate.py", "--checkpoint", tmp_path / "nowhere.pt", "--html", tmp_path)
    assert_user_error(result, "--html", "is a folder")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written"):
        html_text.check_page_path(str(tmp_path / "x.html"))


def test_a_conversation_has_no_page(run, tmp_path):
    page = tmp_path / "x.html"
    assert_user_error(run_script("generate.py", "--checkpoint", run, "--interactive", "--html", page), "--html")
    assert not page.exists()


def test_html_replaces_its_own_pages_and_no_other_file(run, tmp_path):
    command = ["generate.py", "--checkpoint", run, "--max-new-tokens", "3", "--top-k", "None", "--html"]
    page, notes, of_run = tmp_path / "page.html", tmp_path / "notes.txt", tmp_path / "run.html"
    notes.write_text("mine")
    of_run.write_bytes((run / "run.html").read_bytes())
    for _ in range(2):
        assert run_script(*command, page).returncode == 0
    assert "temperature 0.8, seed " in parsed(page).text
    for other in (notes, of_run):
        before = other.read_bytes()
        assert_user_error(run_script(*command, other), f"--html {other}", "is not marked as a page of this command")
        assert other.read_bytes() == before
    half_written = tmp_path / "page.html.tmp"
    half_written.write_text("mine, too")
    assert_user_error(run_script(*command, page), "page.html.tmp is in the way; move it")
    assert half_written.read_text() == "mine, too"
    half_written.write_bytes(b"")  # of a killed command
    assert run_script(*command, page).returncode == 0 and not half_written.exists()
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        assert_user_error(run_script(*command, tmp_path / "pipe"), "is not marked as a page of this command")
        assert (tmp_path / "pipe").is_fifo()


def test_the_page_names_the_seed_of_its_text(run, tmp_path):
    page = tmp_path / "page.html"
    generate.main(GenerateConfig(checkpoint=str(run), device="cpu", max_new_tokens=3, seed=7, html=str(page)))
    assert "temperature 0.8, top-k 200, seed 7" in parsed(page).text


def test_the_name_of_a_checkpoint_cannot_change_the_page(run, tmp_path):
    folder = tmp_path / "a<img src=x>b"
    shutil.copytree(run, folder)
    page = tmp_path / "page.html"
    generate.main(GenerateConfig(checkpoint=str(folder), device="cpu", max_new_tokens=3, html=str(page)))
    assert "img" not in {tag for tag, _ in parsed(page).tags} and "a<img src=x>b" in parsed(page).text

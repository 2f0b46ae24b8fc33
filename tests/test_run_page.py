"""run.html and generate.py --html: what they show is true, complete after a kill, and harmless."""

import base64
import hashlib
import html.parser
import itertools
import json
import math
import os
import re
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import REPO, assert_user_error, run_script, write_splits
from test_train import assert_same_end, full_disk, quick, tiny  # noqa: F401  (quick is autouse)
from torch.nn import functional as F

import train
from internals import html_page, html_text, report, run_page
from internals.checkpoint import load_model
from internals.html_text import TextPage, attention_weights
from internals.start import UserError
from internals.surprise import describe, read_off, readable, surprise, token_texts
from internals.tokenizer import load_tokenizer
from model import CausalSelfAttention

TEXT = "Ein Käfer, 三只猫 und “zwei” 🦉 </script><script>alert(1)</script><b>fett</b>\n\nNoch ein Satz. " * 12
PROMPT = "<img src=x onerror=alert(2)>é"


@pytest.fixture(scope="module")
def text_data(tmp_path_factory):
    """A data folder of TEXT, whose validation passage holds multi-byte characters and script tags."""
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
    return write_splits(tmp_path_factory.mktemp("text") / "data", {"train": np.tile(tokens, 3), "val": tokens})


@pytest.fixture(scope="module")
def run(text_data, tmp_path_factory):
    """A finished run of three evaluations."""
    out_dir = tmp_path_factory.mktemp("page") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda *of_the_curves: None)
        train.train(tiny(text_data, out_dir, sample_prompt=PROMPT))
    return out_dir


class Parsed(html.parser.HTMLParser):
    """The tags of a page, and the contents of its scripts and style."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.inside, self.blocks, self.text = [], None, [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside:
            self.blocks.append((*self.inside, text))
        else:
            self.text += text

    @property
    def data(self) -> dict:
        return json.loads(next(text for _, attributes, text in self.blocks if attributes.get("id") == "data"))


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def parsed(path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Contents


def test_the_page_shows_every_evaluation(run):
    data, samples = parsed(run / "run.html").data, rows(run)
    assert [row["iter"] for row in samples] == [0, 8, 16, 20]
    assert [{name: view[name] for name in samples[0]} for view in data["views"]] == samples
    assert all(
        view["sample"].startswith(PROMPT) and view["label"].endswith(f" {view['iter']}") for view in data["views"]
    )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, key in (("training", "train_loss"), ("validation", "val_loss")):
        expected = [[row["iter"], round(row[key], 4)] for row in metrics if row.get(key) is not None]
        assert data["curve"][name] == expected
    assert data["curve"]["rate"] == [[row["iter"], row["learning_rate"]] for row in metrics if row["iter"]]
    assert data["due"] is None


def test_a_long_training_curve_is_thinned():
    steps = [{"iter": n, "train_loss": 2.0, "learning_rate": 0.1} for n in range(1, 5_001)]
    evaluations = [{"iter": n, "val_loss": 3.0} for n in range(3_000)]
    drawn = run_page.curve([*evaluations, *steps], None)
    assert [iter for iter, _ in drawn["training"]] == list(range(1, 5_001, 3))  # at most 2,000 points
    assert len(drawn["rate"]) == len(drawn["training"]) and len(drawn["validation"]) == 3_000


def test_the_head_names_what_is_not_the_presets(run):
    text = parsed(run / "run.html").text
    assert "finished iteration 20 of 20" in text
    for words in ("n_layer 2", "max_iters 20", "learning_rate 0.01", "2 layers, 2 heads, 16 dimensions", "float32"):
        assert words in text
    assert "vocab_size" not in text and "out_dir" not in text
    assert "(temperature 0.8, the 200 likeliest)" in text


def test_while_it_runs_the_page_says_when_the_next_is_due(text_data, tmp_path, monkeypatch):
    """After an hour, or after three times the seconds since the last page: 200 and 5,000 here."""
    clock = itertools.accumulate([1_000_000, 200, 5_000, 5_000, 5_000])  # the run begins; each page
    monkeypatch.setattr(report, "time", types.SimpleNamespace(time=lambda: next(clock)))
    pages, write = [], report.run_page
    monkeypatch.setattr(report, "run_page", lambda *args: (pages.append(Parsed(page := write(*args))), page)[1])
    train.train(tiny(text_data, tmp_path, max_iters=9))
    # The last two are of the finished run: its last evaluation, and RunLog.close
    assert [page.data["due"] for page in pages] == [1_000_200 + 3_600, 1_005_200 + 15_000, None, None]
    assert "running iteration 8 of 9" in pages[1].text and " left, not counting evaluations" in pages[1].text
    assert "finished" in pages[-1].text and " left" not in pages[-1].text.split("The run")[0]


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
    assert row["passage"] == describe(tokenizer, passage, [surprise(model, passage)])
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


# ----------------------------------------------------------------------------------------------------------------------
# Harmless


@pytest.mark.parametrize("kind", ["run", "text"])
def test_foreign_text_stays_text(run, tmp_path, kind):
    """Script tags in the validation text and in the prompt reach the page as data alone."""
    path = run / "run.html"
    if kind == "text":
        path = tmp_path / "text.html"
        result = run_script(
            "generate.py", "--checkpoint", run, f"--prompt={PROMPT}</script>", "--max-new-tokens", 9, "--html", path
        )
        assert result.returncode == 0, result.stderr
    page = parsed(path)
    scripts = [block for block in page.blocks if block[0] == "script"]
    shown = [
        SCRIPTS
        for SCRIPTS in (html_page.SCRIPT, html_page.HEADS)
        if "attention" in page.data or SCRIPTS != html_page.HEADS
    ]
    assert [text for _, attributes, text in scripts if not attributes] == shown
    assert len(scripts) == len(shown) + 1
    assert not {tag for tag, _ in page.tags} & {"img", "iframe", "link", "object", "base"}
    assert all(not name.startswith("on") and name not in ("style", "href", "src") for _, a in page.tags for name in a)
    assert "<img src=x onerror=alert(2)>" in "".join(
        page.data["views"][0].get("sample", "") or page.data["views"][0]["passage"]["text"]
    )
    assert "<script>" not in path.read_text().split('id="data">')[1].split("</script>")[0]

    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    hashes = {kind: [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
              for tag, a, text in page.blocks if tag == kind and not a] for kind in ("script", "style")}  # fmt: skip
    assert {kind: allowed[f"{kind}-src"].split() for kind in hashes} == hashes
    assert "unsafe" not in policy and "http" not in policy


def test_the_scripts_never_write_html_and_stay_short():
    for script in (html_page.SCRIPT, html_page.HEADS):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|import", script)
    assert len(html_page.SCRIPT.splitlines()) < 150


def test_half_a_character_of_the_command_line_is_no_obstacle(text_data, tmp_path):
    train.train(tiny(text_data, tmp_path, max_iters=1, sample_prompt="caf\udcc3"))
    assert "finished" in parsed(tmp_path / "run.html").text


# ----------------------------------------------------------------------------------------------------------------------
# It costs the run nothing


def test_a_page_that_fails_costs_one_line(text_data, tmp_path, monkeypatch, run, capsys):
    def broken(*args):
        raise ValueError("no page today\nand why")

    monkeypatch.setattr(report, "run_page", broken)
    train.train(tiny(text_data, tmp_path, sample_prompt=PROMPT))
    assert capsys.readouterr().out.count("run.html could not be written (no page today); training continues") == 1
    assert_same_end(tmp_path, run)
    assert rows(tmp_path) == rows(run)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_a_row_that_is_not_finite_costs_no_page(text_data, tmp_path, run, value):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    strange = f'{{"iter": 5, "tokens": 5, "seconds": 1, "train_loss": {value}, "learning_rate": 0.1}}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text(strange + path.read_text())
    (tmp_path / "run.html").unlink()
    train.train(tiny(text_data, tmp_path, resume=True, sample_prompt=PROMPT, max_iters=22))
    assert "finished" in parsed(tmp_path / "run.html").text
    assert path.read_text().startswith(strange)  # it stays where it is


def test_surprises_that_fail_cost_one_line(text_data, tmp_path, monkeypatch, run, capsys):
    def broken(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(report, "sample_row", broken)
    train.train(tiny(text_data, tmp_path, sample_prompt=PROMPT))
    assert capsys.readouterr().out.count("samples.jsonl could not be written (CUDA out of memory.)") == 1
    assert_same_end(tmp_path, run)
    assert parsed(tmp_path / "run.html").data["views"] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_one_line(text_data, tmp_path, monkeypatch, run, capsys):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: (full_disk(tmp_path / "run.html.tmp"), evaluate(*args))[1])
    train.train(tiny(text_data, tmp_path, sample_prompt=PROMPT))
    assert capsys.readouterr().out.count("run.html could not be written") == 1
    assert_same_end(tmp_path, run)


# ----------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


def without_times(page: Parsed) -> tuple:
    status = re.sub(r"(iteration [\d,]+ of [\d,]+).*", r"\1", page.text)
    return page.data, status


@pytest.mark.parametrize("name", ["save", "after save"])
@pytest.mark.parametrize("at", [8, 16])
def test_killed_and_resumed_gives_the_same_page(text_data, tmp_path, monkeypatch, run, name, at):
    """The kill comes before last.pt is written, or between last.pt and the page."""

    class Killed(BaseException):
        pass

    save = train.save

    def kill(run, state, best):
        if name == "after save":
            save(run, state, best)
        if state.iter == at:
            raise Killed
        if name == "save":
            save(run, state, best)

    out_dir = tmp_path / run.name
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save", kill)
        patch.setattr(report.RunLog, "close", lambda self: None)  # a killed run closes nothing
        train.train(tiny(text_data, out_dir, sample_prompt=PROMPT))
    with open(out_dir / "samples.jsonl", "a") as file:
        file.write('{"iter": 16, "pro')  # half a row
    train.train(tiny(text_data, out_dir, sample_prompt=PROMPT, resume=True))
    assert (out_dir / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    assert without_times(parsed(out_dir / "run.html")) == without_times(parsed(run / "run.html"))


def test_a_new_run_begins_with_an_empty_page(text_data, tmp_path):
    train.train(tiny(text_data, tmp_path, max_iters=8))
    train.train(tiny(text_data, tmp_path, max_iters=1, overwrite=True))
    assert [view["iter"] for view in parsed(tmp_path / "run.html").data["views"]] == [0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# generate.py --html


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
    assert "temperature 0, top-k 200, seed 7" in page.text and "sample 2 of 2" in str(page.data)
    plain = run_script("generate.py", "--checkpoint", run, "--prompt", TEXT[:30], *options, "--seed", "7")
    assert plain.stdout == result.stdout


def test_a_prompt_alone_is_measured(run, tmp_path):
    path = tmp_path / "text.html"
    result = run_script(
        "generate.py", "--checkpoint", run, "--device", "cpu", "--prompt", TEXT[:90], "--max-new-tokens", "0", "--html", path
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
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

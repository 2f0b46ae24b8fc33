"""run.html: a run on one page, for people who want to watch it learn."""

import html
import math
from typing import Any

from internals import html_page
from internals.reference import Reference, bits_per_nat
from internals.run import Run
from internals.samples import SAMPLE

NAMES = {"training": "training", "validation": "validation", "rate": "learning rate"}  # of the curves
UNITS = {"training": ["plain"], "validation": ["plain", "bits"], "rate": ["plain"]}
POINTS = 2_000  # of the training curve, at most
VIEWS = 200  # evaluations, at most: each has 17 KB
RISING = " It rises at first, when gradients are large and erratic, and then falls, so that the model settles."
FALLING = " It falls, so that the model settles."

OTHER_ARTICLES = """ The reference was trained on other articles. It can be compared only in bits per byte, so it is
drawn at the loss that gives the same bits per byte on this run's text."""

BODY = """<header><h1>{title}</h1>
<p class="status"><b id="state">{state}</b> {status}</p></header>
<section><h2>The run</h2>{facts}</section>
<section><h2>Loss</h2>
<svg id="chart" tabindex="0" role="application" aria-label="losses and learning rate; arrow keys go from iteration to iteration">
</svg>
<ul id="reading" aria-live="polite"></ul>
<p class="note">The loss is the mean surprise at the next token, in nats: training measures it on the text of the step,
validation on text that the model never trains on. Guessing among all {vocab_size:,} tokens gives {blind:.2f}; lower is
better.{reference}</p>
<p class="note">The learning rate is how far each step moves the weights.{rate}</p></section>
<section class="slider"><output id="label" for="slider"></output>
<input id="slider" type="range" min="0" max="{last}" value="{last}" step="1" aria-label="evaluation"></section>
<div class="columns">
<section><h2>What the model writes</h2><p class="text" id="sample" lang="" translate="no"></p>
<p class="note">Text that the model wrote at this evaluation, after {prompt}. Each token is drawn at random from the likely
ones (temperature {temperature:g}, the {top_k} likeliest).</p></section>
<section>{expected}
<p class="note">The passage is the beginning of the validation split, the same at every evaluation.</p></section>
</div>
"""


def run_page(
    run: Run,
    facts: dict[str, str],
    status: str,
    rows: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    reference: Reference | None,
    due: float | None,
) -> str:
    """The page of a run.

    Args:
        facts: names and texts for the head of the page.
        status: how far the run is, in words.
        rows: those of metrics.jsonl, at least one.
        samples: the rows of samples.jsonl.
        reference: the reference run, if there is one.
        due: while training continues, the time (Unix, seconds) by which a new page comes. The page reloads itself until
            then. None: training has ended.
    """
    title = run.out_dir.resolve().name
    samples = thinned(samples, VIEWS)
    finished = rows[-1]["iter"] >= run.cfg.max_iters
    data = {
        "due": None if finished else due,
        "scale": round(math.log2(run.cfg.model.vocab_size), 3),
        "curve": curve(rows, reference),
        "names": {**NAMES, "reference": reference.label if reference else ""},
        "units": {**UNITS, "reference": ["plain", "bits"] if reference and reference.same_text else ["bits"]},
        "bits_per_nat": round(bits_per_nat(run.meta), 5),
        "views": [{"label": f"iteration {row['iter']:,}", **row} for row in samples],
    }
    falls = run.cfg.final_lr < run.cfg.learning_rate and run.cfg.max_iters > 1
    body = BODY.format(
        title=html.escape(title),
        state="finished" if finished else "running" if due else "stopped",
        status=html.escape(status),
        facts=html_page.facts(facts),
        vocab_size=run.cfg.model.vocab_size,
        blind=math.log(run.cfg.model.vocab_size),
        last=max(0, len(samples) - 1),
        prompt=prompt_of(samples, run.cfg.sample_prompt),
        rate=(RISING if run.cfg.warmup else FALLING) if falls else "",
        reference=OTHER_ARTICLES if reference and not reference.same_text else "",
        expected=html_page.EXPECTED,
        **SAMPLE,
    )
    return html_page.render("run", f"{title}: a training run", body, data)


def thinned(rows: list[Any], most: int) -> list[Any]:
    """At most `most` rows: the first, every second, third, ... after it, and the newest. One more row moves none of
    them, unless the step grows.
    """
    step = max(1, math.ceil((len(rows) - 1) / (most - 1)))
    return rows[:-1:step] + rows[-1:]


def prompt_of(samples: list[dict[str, Any]], prompt: str) -> str:
    """What the samples continue, in words."""
    if any(row["prompt"] != prompt for row in samples):  # the run was resumed with another
        return "its prompt, which is marked"
    if not prompt:
        return "the beginning of an article"
    return f'the prompt “<bdi lang="" translate="no">{html.escape(prompt)}</bdi>”'


def curve(rows: list[dict[str, Any]], reference: Reference | None) -> dict[str, list[list[float]]]:
    """The points `[iteration, value]` of each curve. That of a long training is thinned."""
    steps = thinned([row for row in rows if row.get("train_loss") is not None], POINTS)
    return {
        "training": [[row["iter"], round(row["train_loss"], 4)] for row in steps],
        "validation": [[row["iter"], round(row["val_loss"], 4)] for row in rows if "val_loss" in row],
        "reference": [[iter, round(loss, 4)] for iter, loss in (reference.losses if reference else {}).items()],
        "rate": [[row["iter"], row["learning_rate"]] for row in steps],
    }

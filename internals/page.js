"use strict"; // Shows what the element "data" holds. All text goes in as textContent, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function add(parent, name, attributes, text) {
  const node = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}

// Arrow keys, Home and End in a list: calls act(item) with the item that the key leads to from list[at]
function walk(event, list, at, act) {
  const last = list.length - 1, to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  act(list[Math.max(0, Math.min(last, to))]);
}

function fill(span, text) { // line breaks can be seen, and pointed at
  text.split("\n").forEach((part, n) => (n && add(span, "small", {}, "\u21b5").after("\n"), span.append(part)));
  return span;
}

// ---- The curves: data.curve has [iteration, value] points for each name

const nearest = (points, iter) => points.reduce((a, b) => (Math.abs(b[0] - iter) < Math.abs(a[0] - iter) ? b : a));
const round = (value) => (value < 0.01 ? value.toExponential(2) : value.toFixed(4));
const UNITS = { plain: round, bits: (value) => `${(value * data.bits_per_nat).toFixed(3)} bits per byte` };

function ticks(low, high, count) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= raw), found = [];
  for (let n = Math.ceil(low / step); n * step <= high * 1.000001; n++) found.push(+(n * step).toPrecision(6));
  return found;
}

function chart() {
  const svg = $("chart"), width = svg.clientWidth, height = svg.clientHeight;
  const left = 40, right = width - 56, top = 24, bottom = height - 38;
  const names = Object.keys(data.names).filter((name) => data.curve[name].length);
  const losses = names.filter((name) => name !== "rate").flatMap((name) => data.curve[name]);
  const end = Math.max(1, ...losses.map((point) => point[0])), highest = Math.max(...losses.map((point) => point[1]));
  const lowest = Math.min(highest - 0.1, ...losses.map((point) => point[1]));
  const peak = (Math.max(0, ...data.curve.rate.map((point) => point[1])) || 1) * 1.05; // a rate of 0 is possible
  const x = (iter) => left + (iter / end) * (right - left), yRate = (rate) => bottom - (rate / peak) * (bottom - top);
  const y = (loss) => bottom - ((loss - lowest) / (highest - lowest)) * (bottom - top);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`); // paper is narrower than the screen
  svg.replaceChildren();
  for (const loss of ticks(lowest, highest, 5)) {
    add(svg, "path", { class: "grid", d: `M${left},${y(loss)}H${right}` });
    add(svg, "text", { x: left - 8, y: y(loss) + 4, "text-anchor": "end" }, loss);
  }
  for (const iter of ticks(0, end, Math.min(end, width / 110)))
    add(svg, "text", { x: x(iter), y: bottom + 18, "text-anchor": "middle" }, iter.toLocaleString("en"));
  add(svg, "text", { x: (left + right) / 2, y: height - 2, "text-anchor": "middle" }, "iteration");
  add(svg, "text", { x: 0, y: 10 }, "loss, nats per token");
  if (data.curve.rate.length) {
    for (const rate of ticks(0, peak, 4)) add(svg, "text", { x: right + 8, y: yRate(rate) + 4 }, rate);
    add(svg, "text", { x: width, y: 10, "text-anchor": "end" }, "learning rate");
  }
  for (const name of names) {
    const points = data.curve[name].map(([iter, value]) => [x(iter), name === "rate" ? yRate(value) : y(value)]);
    add(svg, "path", { class: name, d: "M" + points.map((point) => point.map((n) => n.toFixed(1)).join()).join("L") });
    if (name !== "validation") continue;
    for (const [cx, cy] of points) add(svg, "circle", { cx, cy, r: points.length > 60 ? 1.5 : 3 });
  }
  const cross = add(svg, "path", { class: "cross" });
  const iterAt = (event) => ((event.clientX - svg.getBoundingClientRect().left - left) / (right - left)) * end;
  chart.read = (iter) => {
    const at = (chart.at = nearest(losses, iter)[0]);
    cross.setAttribute("d", `M${x(at)},${top}V${bottom}`);
    $("reading").replaceChildren();
    add($("reading"), "li", {}, `iteration ${at.toLocaleString("en")}`);
    for (const name of names) {
      const [where, value] = nearest(data.curve[name], at), item = add($("reading"), "li", { class: name });
      const values = data.units[name].map((unit) => UNITS[unit](value)).join(", ");
      add(item, "i").after(`${data.names[name]} ${values}` + (where === at ? "" : ` (at ${where.toLocaleString("en")})`));
    }
  };
  svg.onpointermove = (event) => chart.read(iterAt(event));
  svg.onpointerleave = () => chart.read(data.views[place]?.iter ?? end);
  svg.onclick = (event) => places.length && show(nearest(places, iterAt(event))[1]);
  const stops = [...new Set(losses.map((point) => point[0]))].sort((a, b) => a - b);
  svg.onkeydown = (event) => walk(event, stops, stops.indexOf(chart.at), chart.read);
  svg.onpointerleave();
}

// ---- Texts coloured by surprise

const percent = (p) => (p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %");
const MARKS = { " ": "\u2423", "\n": "\u21b5", "\t": "\u21e5" };
const mark = (c) => MARKS[c] ?? `<U+${c.codePointAt().toString(16).toUpperCase().padStart(4, "0")}>`;
const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Z}]/gu, mark) || "(nothing)";

function colour(into, tokens) { // tokens that share a character are shown as one
  let group = [];
  into.replaceChildren();
  tokens.text.forEach((text, i) => {
    group.push(i);
    if (!text && i + 1 < tokens.text.length) return;
    const known = group.filter((n) => tokens.bits[n] !== null), bits = known.reduce((a, n) => a + tokens.bits[n], 0);
    const span = add(into, "span", { class: known.length ? "t" : "t first" });
    fill(span, text);
    span.style.setProperty("--a", Math.min(1, bits / data.scale));
    Object.assign(span, { tokens, group });
    group = [];
  });
}

function tip(span) {
  document.querySelectorAll(".t.on").forEach((other) => other.classList.remove("on"));
  $("tip").hidden = !span;
  if (!span) return;
  span.classList.add("on");
  $("tip").replaceChildren();
  const line = (kind, name, value) => {
    const row = add($("tip"), "p", { class: kind });
    for (const text of [name, value]) add(row, "span", {}, text);
  };
  span.group.forEach((n, i) => {
    const bits = span.tokens.bits[n], count = span.group.length;
    const name = visible(span.tokens.text[span.group.at(-1)]) + (count > 1 ? `, token ${i + 1} of ${count}` : "");
    if (bits === null) return line("own", name, "the first: not predicted");
    line("own", name, `${percent(2 ** -bits)}, ${bits.toFixed(1)} bits`);
    span.tokens.alternatives[n].forEach(([text, p]) => line("", visible(text), percent(p)));
  });
  const at = [...span.getClientRects()].reduce((a, b) => (b.width > a.width ? b : a)); // its space may end the line above
  const room = document.documentElement.clientWidth - $("tip").offsetWidth - 12;
  $("tip").style.left = `${Math.max(12, Math.min(at.left, room)) + scrollX}px`;
  const below = at.bottom + 8, above = at.top - 8 - $("tip").offsetHeight;
  $("tip").style.top = `${(below + $("tip").offsetHeight > innerHeight && above > 0 ? above : below) + scrollY}px`;
}
document.addEventListener("pointerover", (event) => event.pointerType === "mouse" && tip(event.target.closest?.(".t")));
for (const tap of ["click", "pointerup"]) document.addEventListener(tap, (event) => tip(event.target.closest?.(".t"))); // iOS sends no click
$("passage").onkeydown = (event) => {
  const spans = [...$("passage").children];
  walk(event, spans, spans.indexOf($("passage").querySelector(".on")), (span) => {
    span.scrollIntoView({ block: "nearest" });
    tip(span);
  });
};
$("passage").onblur = () => tip(null);
document.addEventListener("keydown", (event) => event.key === "Escape" && tip(null));

// ---- The slider: its place is in the address, so that reloading keeps it; the newest view is always #latest

const places = data.views.map((view, n) => [view.iter, n]), newest = places.length - 1;

function show(number) {
  place = Math.max(0, Math.min(number, newest));
  const view = data.views[place];
  if (!view) return;
  if ($("slider")) {
    $("slider").value = place;
    $("label").textContent = view.label;
    $("slider").setAttribute("aria-valuetext", view.label);
  }
  if ($("sample")) {
    const prompt = view.sample.startsWith(view.prompt) ? view.prompt : "";
    $("sample").replaceChildren();
    add($("sample"), "span", { class: "prompt" }, prompt).after(view.sample.slice(prompt.length));
  }
  colour($("passage"), view.passage);
  $("bits").textContent = view.passage.bits_per_byte?.toFixed(3) ?? "\u2013";
  if ($("chart")) chart.read(view.iter);
  tip(null);
  if ($("slider")) try { history.replaceState(null, "", "#" + (place === newest ? "latest" : view.iter)); } catch {} // too often, says Safari
}

const hash = location.hash.slice(1), chosen = /^\d+$/.test(hash) && places.length; // it may have been thinned out since
let place = chosen ? nearest(places, hash)[1] : $("chart") || hash === "latest" ? newest : 0;
if ($("chart")) { chart(); addEventListener("resize", chart); }
if ($("slider")) $("slider").oninput = () => show(+$("slider").value);
if (!places.length) for (const box of document.querySelectorAll(".slider, .columns")) box.remove();
const before = history.state; // of the page before it reloaded itself
show(place);
if (before) $(before.focus)?.focus({ preventScroll: true });
if (before?.focus === "chart") chart.read(before.at);
if (data.due) { // a killed run writes no new page, but the next may also be hours away
  const wait = Date.now() > 1000 * data.due ? 300000 : 10000; // milliseconds
  if (wait > 10000) $("state").textContent = "no news, perhaps killed";
  setTimeout(function reload() {
    const busy = !$("tip").hidden || document.querySelector("#slider:active") || !getSelection().isCollapsed;
    if (busy) return setTimeout(reload, wait);
    try { history.replaceState({ focus: document.activeElement.id, at: chart.at }, "", location.hash); } catch {}
    location.reload();
  }, wait);
}

"use strict";
// The attention of each head: a grid of small pictures to choose from, and the text, coloured for the token pointed at.
const { text, heads, weights } = data.attention, size = text.length;
// The attention of token i to token j, of a head that is packed as one byte for each pair: rows of 1, 2, 3, ... bytes
const weight = (head, i, j) => (j > i ? 0 : head.charCodeAt((i * (i + 1)) / 2 + j) / 255);
const words = text.map((part) => fill(add($("looks"), "span", { class: "a" }), part));
const named = (j) => `\u2068${visible(text[j])}\u2069`; // whatever its direction
let shown = size - 1; // the token whose attention the text shows

function look(head) {
  words.forEach((word, j) => {
    word.style.setProperty("--a", Math.sqrt(weight(head, shown, j)));
    word.classList.toggle("on", j === shown);
  });
  const seen = text.map((_, j) => [weight(head, shown, j), j]).sort(([a], [b]) => b - a).filter(([share]) => share);
  const shares = seen.slice(0, 3).map(([share, j]) => `${named(j)} ${percent(share)}`);
  $("most").textContent = `${named(shown)} looks most at ${shares.join(", ")}`;
}

function choose(button, head) {
  for (const other of $("heads").querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
  $("head").textContent = button.title;
  $("looks").onpointerover = $("looks").onclick = (event) => {
    const word = event.target.closest(".a");
    if (word) look(head, (shown = words.indexOf(word)));
  };
  $("looks").onkeydown = (event) => walk(event, words, shown, (word) => look(head, (shown = words.indexOf(word))));
  look(head);
}

function picture(canvas, head) {
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  for (let i = 0; i < size; i++)
    for (let j = 0; j <= i; j++) image.data.set([47, 140, 115, 255 * Math.sqrt(weight(head, i, j))], 4 * (i * size + j));
  context.putImageData(image, 0, 0);
}

$("heads").style.setProperty("--heads", heads);
for (let n = 0; n <= heads; n++) add($("heads"), "span", {}, n ? n : "");
weights.forEach((layer, number) => {
  add($("heads"), "span", {}, `layer ${number + 1}`);
  layer.forEach((packed, n) => {
    const head = atob(packed), name = `layer ${number + 1}, head ${n + 1}`;
    const button = add($("heads"), "button", { title: name, "aria-label": name });
    picture(add(button, "canvas", { width: size, height: size }), head);
    button.onclick = () => choose(button, head);
  });
});
$("heads").querySelector("button").click();

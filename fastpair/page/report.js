"use strict";
// Moves the threshold: all numbers come from counts that stand in the page.
const data = JSON.parse(document.getElementById("counts").textContent);
const slider = document.getElementById("threshold");
const candidates = document.getElementById("candidates");
const share = document.getElementById("share");
const decimals = new Intl.NumberFormat("en", { minimumFractionDigits: 4, maximumFractionDigits: 4 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const bad = data.pairs - data.good;

function rates(at) {
  const hits = data.hits[at], taken = data.taken[at];
  return {
    hits, taken, wrong: taken - hits, missed: data.good - hits, left: bad - taken + hits,
    precision: hits / taken, recall: hits / data.good, f1: 2 * hits / (taken + data.good),
    "false-rate": (taken - hits) / bad,
  };
}

function show() {
  const at = Number(slider.value), now = rates(at);
  const number = Number(candidates.value), good = Number(share.value) / 100;
  now["expected-good"] = number * good * now.recall;
  now["expected-bad"] = number * (1 - good) * now["false-rate"];
  now.expected = now["expected-good"] + now["expected-bad"];
  now["expected-precision"] = now["expected-good"] / now.expected;
  for (const field of document.querySelectorAll("[data-show]")) {
    const value = now[field.dataset.show], kind = field.dataset.kind;
    field.textContent = !Number.isFinite(value) ? "\u2013" : kind === "count" ? whole.format(value) : decimals.format(value);
  }
  for (const field of document.querySelectorAll("[data-value]")) {
    field.textContent = data.shown[field.dataset.value][at];
  }
  const said = [now.precision, now.recall].map((value) => decimals.format(value));
  slider.setAttribute("aria-valuetext", `${data.shown.threshold[at]}, precision ${said[0]}, recall ${said[1]}`);
  const places = (n) => ({
    histogram: [data.values[n], 0], roc: [rates(n)["false-rate"], rates(n).recall],
    ranked: [rates(n).recall, rates(n).precision],
  });
  const from = places(data.at), to = places(at);
  for (const name of Object.keys(data.moves)) {
    const moved = [0, 1].map((axis) => (to[name][axis] - from[name][axis]) * data.moves[name][axis]);
    const mark = document.getElementById(name + "-mark");
    if (mark && moved.every(Number.isFinite)) mark.setAttribute("transform", `translate(${moved})`);
  }
}

for (const input of [slider, candidates, share]) input.addEventListener("input", show);
document.getElementById("back").addEventListener("click", () => { slider.value = data.at; show(); });
for (const hidden of document.querySelectorAll("[data-needs-script]")) hidden.hidden = false;
show();

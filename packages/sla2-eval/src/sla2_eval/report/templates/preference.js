"use strict";
// One pair after the other; votes are kept in this browser, so that one can go on later.
const $ = (id) => document.getElementById(id);
const { page, pairs } = JSON.parse($("data").textContent);
const place = `sla2-preference-${page}`;
let state = { rater: "", votes: {} };
let at = 0;

try { state = JSON.parse(localStorage.getItem(place)) ?? state; } catch { /* not kept: begin anew */ }

function keep() {
  try { localStorage.setItem(place, JSON.stringify(state)); } catch { /* a private window */ }
  const text = JSON.stringify({ page, rater: state.rater, votes: state.votes }, null, 1);
  $("save").href = `data:application/json;charset=utf-8,${encodeURIComponent(text)}`;
  $("save").download = `votes-${state.rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
  const count = Object.keys(state.votes).length;
  $("done").max = pairs.length;
  $("done").value = count;
  $("said").textContent = `${count} of ${pairs.length}`;
  $("saving").hidden = count === 0;
}

function medium(side, pair) {
  const element = document.createElement(pair.image ? "img" : "video");
  if (pair.image) element.alt = side;
  else Object.assign(element, { muted: true, playsInline: true, preload: "auto" });
  if (!pair.image) element.setAttribute("aria-label", side);
  element.src = pair[side];
  $(`media-${side}`).replaceChildren(element);
  return element;
}

function show() {
  const over = at >= pairs.length;
  $("pair").hidden = over;
  $("end").hidden = !over;
  keep();
  if (over) return;
  const pair = pairs[at];
  $("prompt").textContent = pair.prompt;
  for (const choice of ["left", "same", "right"]) {
    $(choice).setAttribute("aria-pressed", String(state.votes[pair.id] === choice));
  }
  $("back").disabled = at === 0;
  const both = ["left", "right"].map((side) => medium(side, pair));
  if (pair.image) return;
  const begin = () => both.forEach((video) => { video.currentTime = 0; video.play().catch(() => {}); });
  const ready = both.map((video) => new Promise((go) => video.addEventListener("canplay", go, { once: true })));
  Promise.all(ready).then(begin);
  // In step: both begin again when the longer one has ended.
  both.forEach((video) => video.addEventListener("ended", () => { if (both.every((v) => v.ended)) begin(); }));
}

function vote(choice) {
  state.votes[pairs[at].id] = choice;
  at += 1;
  show();
}

function begin() {
  $("who").hidden = true;
  const open = pairs.findIndex((pair) => !(pair.id in state.votes));
  at = open < 0 ? pairs.length : open;
  show();
}

for (const choice of ["left", "same", "right"]) $(choice).addEventListener("click", () => vote(choice));
$("back").addEventListener("click", () => { at -= 1; show(); });
document.addEventListener("keydown", (event) => {
  const choice = { ArrowLeft: "left", ArrowDown: "same", ArrowRight: "right" }[event.key];
  if (!choice || $("pair").hidden || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  if (!event.repeat) vote(choice); // a key that is held votes once
});
$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  state.rater = $("rater").value.trim();
  if (state.rater) begin();
});
if (state.rater) begin();

"use strict";
// One pair after the other; the votes of each rater are kept in this browser, so that one can go on
// later and several can share it.
const $ = (id) => document.getElementById(id);
const { page, pairs } = JSON.parse($("data").textContent);
const place = `sla2-preference-${page}`;
const choices = ["left", "same", "right"];
let state = { rater: "", raters: {} };
let at = 0;

try { state = JSON.parse(localStorage.getItem(place)) ?? state; } catch { /* not kept: begin anew */ }

// Of the present rater: choices by pair, and the sides that the browser could not show.
const mine = () => state.raters[state.rater] ??= { votes: {}, unshown: {} };

function keep() {
  const { votes, unshown } = mine();
  try { localStorage.setItem(place, JSON.stringify(state)); } catch { /* a private window */ }
  const text = JSON.stringify({ page, rater: state.rater, votes, unshown }, null, 1);
  $("save").href = `data:application/json;charset=utf-8,${encodeURIComponent(text)}`;
  $("save").download = `votes-${state.rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
  const count = Object.keys(votes).length;
  $("done").max = pairs.length;
  $("done").value = count;
  $("said").textContent = `${count} of ${pairs.length}`;
  $("name").textContent = state.rater;
  $("saving").hidden = false;
}

function medium(side, pair, fail) {
  const element = document.createElement(pair.image ? "img" : "video");
  if (pair.image) element.alt = side;
  else Object.assign(element, { muted: true, playsInline: true, preload: "auto" });
  if (!pair.image) element.setAttribute("aria-label", side);
  element.addEventListener("error", () => fail(side), { once: true });
  element.shown = new Promise((go) => element.addEventListener(pair.image ? "load" : "canplay", go, { once: true }));
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
  $("unshown").hidden = true;
  for (const choice of choices) {
    $(choice).disabled = true;
    $(choice).setAttribute("aria-pressed", String(mine().votes[pair.id] === choice));
  }
  $("back").disabled = at === 0;
  // A vote is taken once both can be seen, and none where one cannot.
  const fail = (side) => {
    if (pairs[at] !== pair) return;
    for (const choice of choices) $(choice).disabled = true;
    delete mine().votes[pair.id];
    mine().unshown[pair.id] = side;
    $("unshown-side").textContent = `${side} ${pair.image ? "picture" : "video"}`;
    $("unshown").hidden = false;
    keep();
  };
  const both = ["left", "right"].map((side) => medium(side, pair, fail));
  const begin = () => both.forEach((video) => { video.currentTime = 0; video.play().catch(() => {}); });
  Promise.all(both.map((element) => element.shown)).then(() => {
    if (pairs[at] !== pair) return;
    for (const choice of choices) $(choice).disabled = false;
    delete mine().unshown[pair.id];
    if (!pair.image) begin();
  });
  // In step: both begin again when the longer one has ended.
  both.forEach((video) => video.addEventListener("ended", () => { if (both.every((v) => v.ended)) begin(); }));
}

function vote(choice) {
  mine().votes[pairs[at].id] = choice;
  at += 1;
  show();
}

function begin() {
  $("who").hidden = true;
  const { votes, unshown } = mine();
  const open = pairs.findIndex((pair) => !(pair.id in votes || pair.id in unshown));
  at = open < 0 ? pairs.length : open;
  show();
}

for (const choice of choices) $(choice).addEventListener("click", () => vote(choice));
$("back").addEventListener("click", () => { at -= 1; show(); });
$("next").addEventListener("click", () => { at += 1; show(); });
$("other").addEventListener("click", () => {
  at = pairs.length; // nothing that still loads is of the next rater
  for (const id of ["pair", "end", "saving"]) $(id).hidden = true;
  $("rater").value = state.rater = "";
  try { localStorage.setItem(place, JSON.stringify(state)); } catch { /* a private window */ }
  $("who").hidden = false;
  $("rater").focus();
});
document.addEventListener("keydown", (event) => {
  const choice = { ArrowLeft: "left", ArrowDown: "same", ArrowRight: "right" }[event.key];
  if (!choice || $("pair").hidden || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  if (!event.repeat && !$(choice).disabled) vote(choice); // a key that is held votes once
});
$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  state.rater = $("rater").value.trim();
  if (state.rater) begin();
});
if (state.rater) begin();

"use strict";
// Filters the example cards, shows one checkpoint's points at a time, enlarges pictures, opens lineage on arrival.
const byId = (id) => document.getElementById(id);
const controls = {text: byId("f-text"), task: byId("f-task"), checkpoint: byId("f-checkpoint"), outcome: byId("f-outcome")};
const groups = [...document.querySelectorAll(".task-cards")].map((section) => ({
  section,
  task: section.dataset.task,
  grid: section.querySelector(".cards"),
  cards: [...section.querySelectorAll(".card")].map((element) => ({
    element,
    scores: element.dataset.scores.split(" ").map(Number),
    text: element.textContent.toLowerCase(),
  })),
}));

function wanted(card, task, checkpoint) {
  if (controls.task.value && controls.task.value !== task) return false;
  const right = card.scores[checkpoint] >= 1;
  if (controls.outcome.value && (controls.outcome.value === "good") !== right) return false;
  return controls.text.value.toLowerCase().split(/\s+/).every((word) => card.text.includes(word));
}

function filter() {
  const checkpoint = Number(controls.checkpoint.value);
  let shown = 0;
  let all = 0;
  for (const group of groups) {
    let here = 0;
    for (const card of group.cards) {
      const keep = wanted(card, group.task, checkpoint);
      card.element.hidden = !keep;
      here += keep ? 1 : 0;
    }
    group.section.hidden = here === 0;
    shown += here;
    all += group.cards.length;
  }
  byId("f-count").textContent = `${shown} of ${all} examples`;
  byId("f-empty").hidden = shown > 0;
}

function choose() {
  const chosen = controls.checkpoint.value;
  for (const group of groups) {
    const sorted = [...group.cards].sort((a, b) => a.scores[Number(chosen)] - b.scores[Number(chosen)]);
    group.grid.append(...sorted.map((card) => card.element));
  }
  for (const element of document.querySelectorAll(".pred")) {
    if (element.dataset.checkpoint === chosen) element.removeAttribute("hidden");
    else element.setAttribute("hidden", "");
  }
  for (const element of document.querySelectorAll(".answer")) {
    element.classList.toggle("off", element.dataset.checkpoint !== chosen);
  }
  filter();
}

function zoom(picture) {
  const dialog = byId("zoom");
  const large = picture.firstElementChild.cloneNode(true);
  large.querySelector("img").loading = "eager";
  dialog.lastElementChild.replaceChildren(large);
  dialog.showModal();
}

function arrive() {
  const target = location.hash.length > 1 && byId(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
}

byId("filters").addEventListener("submit", (event) => event.preventDefault());
controls.checkpoint.addEventListener("change", choose);
for (const name of ["task", "outcome"]) controls[name].addEventListener("change", filter);
controls.text.addEventListener("input", filter);
for (const picture of document.querySelectorAll(".picture")) picture.addEventListener("click", () => zoom(picture));
byId("zoom").addEventListener("click", (event) => { if (event.target === event.currentTarget) event.currentTarget.close(); });
window.addEventListener("hashchange", arrive);
arrive();
choose();

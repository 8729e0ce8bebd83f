"use strict";
// Draws what is looked at: example cards, tasks' tables, comparisons, lineage. Data are JSON blocks of the page; all of
// them become text nodes and attributes, never markup. What is open stands in the address, so that it can be sent on:
// #lineage/TASK/CHECKPOINT, #card/TASK/ID, #pair/TASK/A/B, #run/RUN, #compare/A/B, #examples/TASK/CHECKPOINT/OUTCOME/THAN.

const PAGE = 24; // cards drawn at a time
const FEW = 4; // checkpoints up to which a card shows all answers
const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);
const data = read("numbers");
const commits = read("commits");
const alpha = 1 - data.confidence;
const names = data.checkpoints.map((one) => one.name);

function once(work) {
  const known = new Map();
  return (key) => {
    if (!known.has(key)) known.set(key, work(key));
    return known.get(key);
  };
}
const picturesOf = once((task) => read(`pictures-${task}`));
const cardsOf = once((task) => read(`cards-${task}`).map((card) => ({
  ...card,
  task,
  words: [card.id, card.prompt, card.reference, ...card.answers.flatMap((said) => [said.text, said.read || ""])]
    .join("\n").toLowerCase(),
})));

// --- building

const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;
// What would hide, or turn round what follows, is written out.
const visible = (text) => String(text).replace(CONTROLS, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const child of children.flat(9)) {
    if (child !== null && child !== undefined && child !== false) {
      element.append(child instanceof Node ? child : visible(child));
    }
  }
  return element;
}
const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const sub = (...children) => make("span", {class: "sub"}, ...children);
const text = (value) => make("bdi", {}, value);
const code = (value) => make("code", {}, value);
const link = (parts) => `#${parts.map((part) => encodeURIComponent(part)).join("/")}`;
const lineageLink = (task, checkpoint) => link(["lineage", data.tasks[task].name, ...names[checkpoint].split("/")]);
const cardLink = (card) => link(["card", data.tasks[card.task].name, card.id]);
const swatch = (checkpoint) => make("span", {class: `swatch s${data.checkpoints[checkpoint].colour}`, "aria-hidden": "true"});
const title = (checkpoint) => [swatch(checkpoint), `${data.checkpoints[checkpoint].run} ${data.checkpoints[checkpoint].step}`];

// --- numbers

const output = (task, name) => data.tasks[task].outputs[name] || {percent: true, lower: false, definition: ""};
function number(value, percent) {
  if (percent) return (value * 100).toFixed(1);
  return Math.abs(value) < 10 ? value.toFixed(3) : value.toFixed(1);
}
const signed = (value, percent) => (value > 0 ? "+" : value < 0 ? "−" : "±") + number(Math.abs(value), percent);
const chance = (p) => (p < 0.0001 ? "< 0.0001" : p.toFixed(p < 0.01 ? 4 : 3));
const bounds = (low, high, percent) => `${number(low, percent)} – ${number(high, percent)}`;

function right(task, score) {
  const about = data.tasks[task];
  if (score === null || about.unbounded) return null;
  return output(task, about.item).lower ? score <= 0 : score >= about.upper;
}
function gain(card, from, to) {
  const [before, after] = [card.answers[from].score, card.answers[to].score];
  if (before === null || after === null) return 0;
  return (after - before) * (output(card.task, data.tasks[card.task].item).lower ? -1 : 1);
}
function chip(task, score) {
  const value = score === null ? "n/a" : Number(score.toPrecision(3)).toString();
  const good = right(task, score);
  const wrong = good === false && (output(task, data.tasks[task].item).lower ? score >= data.tasks[task].upper : score <= 0);
  const kind = good ? "good" : wrong ? "bad" : good === null ? "plain" : "part";
  const sign = good ? "✓" : wrong ? "✗" : value;
  return make("span", {class: `chip ${kind}`, title: `score ${value}`}, sign, make("span", {class: "hidden"}, ` score ${value}`));
}
function bar(low, mean, high, widest) {
  const place = (value) => Math.min(100, Math.max(0, (value / widest) * 100));
  return draw("svg", {class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true"},
    draw("rect", {class: "track", width: 100, height: 8, rx: 2}),
    draw("rect", {class: "interval", x: place(low), width: Math.max(0, place(high) - place(low)), height: 8}),
    draw("rect", {class: "mean", x: Math.max(0, place(mean) - 0.6), width: 1.2, height: 8}));
}
function table(attributes, head, rows) {
  return make("table", attributes, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows));
}
const column = (...children) => make("th", {scope: "col"}, ...children);
const rowHead = (...children) => make("th", {scope: "row"}, ...children);
const scroll = (label, child) => make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": label}, child);

// --- tasks

function openTask(details) {
  if (!details.open || details.dataset.drawn) return;
  details.dataset.drawn = "yes";
  const task = Number(details.dataset.task);
  const about = data.tasks[task];
  const heads = data.checkpoints.map((_, number_) => column(title(number_)));
  const rows = Object.keys(about.results[0].metrics).map((metric) => {
    const {percent, lower, definition} = output(task, metric);
    const base = about.baseline.metrics[metric];
    return make("tr", {}, rowHead(metric, sub(metric === about.primary ? "primary · " : "", definition, lower ? " · less is better" : "")),
      about.results.map((result) => {
        const [mean, stderr, low, high, n] = result.metrics[metric];
        return make("td", {}, number(mean, percent), sub(`± ${number(stderr, percent)} · ${bounds(low, high, percent)}`, n === about.n ? "" : ` · n = ${n}`));
      }), make("td", {}, base ? number(base[0], percent) : "–"));
  });
  const counts = [["unparsed answers", "unparsed"], ["answers cut off", "cut"]].map(([label, name]) => make("tr", {}, rowHead(label),
    about.results.map((result, checkpoint) => make("td", {}, result[name] ? make("a", {href: link(["examples", about.name, names[checkpoint], name])}, result[name]) : "0")), make("td", {})));
  details.append(
    scroll(`Numbers of ${about.name}`, table({class: "metrics"}, [column("Number"), heads, column("Majority")], [rows, counts])),
    make("p", {class: "note"}, about.citation, about.baseline.rule ? ` Majority: ${about.baseline.rule}.` : "", " ± is one standard error, clustered by image.", judgeNote(about), " ",
      make("a", {href: link(["examples", about.name])}, "Examples of this task")));
  if (about.slices.length) details.append(slices(task));
}
function judgeNote(about) {
  return about.results.map((result, checkpoint) => result.judged &&
    ` ${names[checkpoint]}: ${result.judged.asked - result.judged.missing} of ${result.judged.asked} judgements by ${result.judged.judge}` +
    (result.judged.missing ? `; ${result.judged.missing} are missing and scored as none.` : "."));
}
function slices(task) {
  const about = data.tasks[task];
  const {percent} = output(task, about.primary);
  const highs = about.slices.flatMap((one) => one.results.map((result) => (result ? result[2] : 0)));
  const widest = percent ? 1 : Math.max(1e-9, ...highs);
  let last = null;
  const rows = about.slices.flatMap((one) => {
    const head = one.by === last ? [] : [make("tr", {class: "by"}, make("th", {colspan: names.length + 2, scope: "colgroup"}, one.by.replaceAll("_", " ")))];
    last = one.by;
    const known = one.results.find((result) => result);
    return [...head, make("tr", {}, rowHead(text(one.value)), make("td", {}, known ? known[3] : 0), one.results.map((result) =>
      make("td", {}, result ? [number(result[0], percent), sub(bounds(result[1], result[2], percent), result[3] === known[3] ? "" : ` · n = ${result[3]}`), bar(result[1], result[0], result[2], widest)] : "–"))) ];
  });
  return make("div", {}, make("h3", {}, "Slices ", sub(about.primary)),
    scroll(`Slices of ${about.name}`, table({class: "slices"}, [column("Slice"), column("n"), data.checkpoints.map((_, index) => column(title(index)))], rows)));
}

// --- comparison

function pairOf(a, b, task) {
  const flip = a > b;
  const found = data.pairs.find((pair) => pair.a === Math.min(a, b) && pair.b === Math.max(a, b)).tasks[task];
  const [difference, low, high, p, holm, wins, losses, n, won, lost] = found;
  return flip ? {difference: -difference, low: -high, high: -low, p, holm, wins: losses, losses: wins, n, won: lost, lost: won}
    : {difference, low, high, p, holm, wins, losses, n, won, lost};
}
function verdict(pair, lower) {
  if (pair.holm >= alpha || pair.difference === 0) return ["level", "no significant difference"];
  return (pair.difference > 0) !== lower ? ["good", "▲ better"] : ["bad", "▼ worse"];
}
function difference(pair, widest) {
  const place = (value) => 50 + Math.min(50, Math.max(-50, (value / widest) * 50));
  return draw("svg", {class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true"},
    draw("rect", {class: "track", width: 100, height: 8, rx: 2}),
    draw("rect", {class: "interval", x: place(pair.low), width: Math.max(0.5, place(pair.high) - place(pair.low)), height: 8}),
    draw("rect", {class: "mean", x: place(pair.difference) - 0.6, width: 1.2, height: 8}),
    draw("path", {class: "base", d: "M50 0V8"}));
}
function compare() {
  if (!byId("pair")) return;
  const [a, b] = [Number(byId("c-a").value), Number(byId("c-b").value)];
  if (a === b) {
    byId("c-table").replaceChildren();
    byId("c-summary").textContent = "choose two different checkpoints";
    return;
  }
  const pairs = data.tasks.map((_, task) => pairOf(a, b, task));
  const percents = pairs.filter((_, task) => output(task, data.tasks[task].item).percent);
  const widest = Math.max(1e-9, ...percents.flatMap((pair) => [Math.abs(pair.low), Math.abs(pair.high)]));
  const counts = {good: 0, bad: 0, level: 0};
  const rows = pairs.map((pair, task) => {
    const about = data.tasks[task];
    const {percent, lower} = output(task, about.item);
    const [kind, words] = verdict(pair, lower);
    counts[kind] += 1;
    const to = link(["pair", about.name, names[a], names[b]]);
    const own = percent ? widest : Math.max(1e-9, Math.abs(pair.low), Math.abs(pair.high));
    return make("tr", {}, rowHead(about.name, sub(about.item, lower ? " · less is better" : "")),
      make("td", {}, make("a", {class: "value", href: to}, signed(pair.difference, percent)), sub(`${signed(pair.low, percent)} … ${signed(pair.high, percent)}`), difference(pair, own)),
      make("td", {}, chance(pair.holm), sub(`unadjusted ${chance(pair.p)}`)),
      make("td", {}, make("a", {href: to, "aria-label": `${pair.wins} wins in ${about.name}`}, pair.wins), sub("wins")),
      make("td", {}, make("a", {href: to, "aria-label": `${pair.losses} losses in ${about.name}`}, pair.losses), sub("losses")),
      make("td", {}, make("span", {class: `verdict ${kind}`}, words)));
  });
  const heads = ["Task", "Difference", "p (Holm)", "Wins", "Losses", "Verdict"].map((head) => column(head));
  byId("c-table").replaceChildren(...table({}, heads, rows).children);
  byId("c-summary").textContent = `better on ${counts.good}, worse on ${counts.bad}, no significant difference on ${counts.level}`;
}
function pairPanel(task, a, b) {
  const about = data.tasks[task];
  const {percent, lower} = output(task, about.item);
  const pair = pairOf(a, b, task);
  const list = (ids, kind) => {
    if (!ids.length) return make("p", {class: "note"}, "none");
    return make("ul", {class: "items"}, ids.map((id) => {
      const card = cardsOf(task).find((one) => one.id === id);
      if (!card) return make("li", {}, code(id), sub("no card of it here; see the predictions"));
      return make("li", {}, make("a", {href: cardLink(card)}, text(card.prompt)), sub(`${id} · reference `, text(card.reference)),
        sub(title(a), " ", text(card.answers[a].text), " ", chip(task, card.answers[a].score)), sub(title(b), " ", text(card.answers[b].text), " ", chip(task, card.answers[b].score)));
    }), make("li", {}, make("a", {href: link(["examples", about.name, names[b], kind, names[a]])}, "All cards like these")));
  };
  panel(`${about.name}: ${names[a]} → ${names[b]}`,
    facts([["difference", `${signed(pair.difference, percent)} (${signed(pair.low, percent)} … ${signed(pair.high, percent)}), ${verdict(pair, lower)[1]}`],
      ["number", [about.item, lower ? " (less is better)" : "", sub(output(task, about.item).definition)]],
      ["p-value", `${chance(pair.p)}; Holm's over ${data.tasks.length} tasks ${chance(pair.holm)}`],
      ["items", `${pair.n}: ${pair.wins} wins, ${pair.losses} losses, ${pair.n - pair.wins - pair.losses} level`],
      ["lineage", [make("a", {href: lineageLink(task, a)}, names[a]), " · ", make("a", {href: lineageLink(task, b)}, names[b])]]]),
    make("h3", {}, "Largest wins"), list(pair.won, "won"), make("h3", {}, "Largest losses"), list(pair.lost, "lost"));
}

// --- lineage

const facts = (pairs) => make("dl", {}, pairs.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
function commitOf(digest) {
  const found = commits[digest];
  if (!found) return sub("its commit: ", code(`python -m pipelines.commits code=${digest.slice(0, 16)}`));
  return sub("commit ", code(found.commit), found.changed ? " with uncommitted changes" : "");
}
function lineagePanel(task, checkpoint) {
  const about = data.tasks[task];
  const result = about.results[checkpoint];
  const {percent, lower, definition} = output(task, about.primary);
  const [mean, stderr, low, high, n] = result.metrics[about.primary];
  const from = result.lineage;
  const run = data.checkpoints[checkpoint].run;
  const where = `${names[checkpoint]}/${about.name}`;
  panel(`${about.name} of ${names[checkpoint]}: ${number(mean, percent)}`,
    facts([
      ["number", [about.primary, lower ? " (less is better)" : "", sub(definition)]],
      ["interval", `${bounds(low, high, percent)} (${(data.confidence * 100).toPrecision(3) / 1}%), standard error ${number(stderr, percent)}, n = ${n}`],
      ["examples", [make("a", {href: link(["examples", about.name, names[checkpoint], result.wrong ? "bad" : ""])}, `${cardsOf(task).length} of ${about.items} shown`),
        sub(`${result.unparsed} unparsed, ${result.cut} cut off`)]],
      ...(result.judged ? [["judge", `${result.judged.judge}: ${result.judged.asked} asked, ${result.judged.missing} missing`]] : []),
      ["metrics", [code(from.metrics), sub(`artifacts/metrics/${where}`)]],
      ["predictions", [code(from.predictions), sub(`artifacts/predictions/${where}`)]],
      ["weights", [code(from.weights), sub(`artifacts/checkpoints/${names[checkpoint]}`), data.runs[run] && sub(make("a", {href: link(["run", run])}, `what ${run} was trained with`))]],
      ["data", [code(from.shards), sub(make("a", {href: "#data"}, "licence, source and revision"))]],
      ["code", [code(from.code), commitOf(from.code)]],
      ...data.params[from.params].map(([name, value]) => [name, code(value)]),
    ]));
}
function runPanel(run) {
  const about = data.runs[run];
  panel(run, facts([["checkpoints", [code(about.digest), sub(`artifacts/checkpoints/${run}`)]], ["code", [code(about.code), commitOf(about.code)]],
    ...Object.entries(about.inputs).map(([name, digest]) => [name, code(digest)]),
    ...about.params.map(([name, value]) => [name, make("pre", {tabindex: "0"}, value)])]));
}

// --- examples

const controls = Object.fromEntries(["text", "task", "checkpoint", "outcome", "than", "order"].map((name) => [name, byId(`f-${name}`)]));
const chosen = () => Number(controls.checkpoint.value);
const than = () => (controls.than ? Number(controls.than.value) : chosen());
let matching = [];
let drawn = 0;

const OUTCOMES = {
  good: (card) => right(card.task, card.answers[chosen()].score) === true,
  bad: (card) => right(card.task, card.answers[chosen()].score) === false,
  unparsed: (card) => card.answers[chosen()].unparsed,
  cut: (card) => card.answers[chosen()].cut,
  won: (card) => gain(card, than(), chosen()) > 0,
  lost: (card) => gain(card, than(), chosen()) < 0,
  same: (card) => gain(card, than(), chosen()) === 0,
};
function goodness(card) {
  const {score} = card.answers[chosen()];
  if (score === null) return Infinity;
  return output(card.task, data.tasks[card.task].item).lower ? -score : score;
}
const ORDERS = {
  worst: (a, b) => goodness(a) - goodness(b) || 0,
  best: (a, b) => goodness(b) - goodness(a) || 0,
  change: (a, b) => Math.abs(gain(b, than(), chosen())) - Math.abs(gain(a, than(), chosen())),
  id: (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0),
};
function filter() {
  const tasks = controls.task.value === "" ? data.tasks.map((_, task) => task) : [Number(controls.task.value)];
  const words = controls.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const keep = OUTCOMES[controls.outcome.value] || (() => true);
  const all = tasks.flatMap((task) => [...cardsOf(task)].sort(ORDERS[controls.order.value]));
  matching = all.filter((card) => keep(card) && words.every((word) => card.words.includes(word)));
  if (byId("f-than-label")) byId("f-than-label").hidden = !["won", "lost", "same"].includes(controls.outcome.value) && controls.order.value !== "change";
  drawn = 0;
  byId("cards").replaceChildren();
  more();
  const items = tasks.reduce((sum, task) => sum + data.tasks[task].items, 0);
  byId("f-count").textContent = `${matching.length} of ${all.length} cards, drawn from ${items} items`;
  byId("f-empty").hidden = matching.length > 0;
}
function more() {
  const next = matching.slice(drawn, drawn + PAGE).map(cardOf);
  drawn += next.length;
  byId("cards").append(...next);
  byId("f-more").hidden = drawn >= matching.length;
  return next[0];
}
function answered(card) {
  const every = names.map((_, checkpoint) => checkpoint);
  return every.length <= FEW ? every : every.filter((one) => one === chosen() || (one === than() && controls.outcome.value));
}
function marked(said, reference) {
  // of texts with as many words as their reference, more than two, words that differ are marked
  const [words, wanted] = [said.split(/\s+/), reference.split(/\s+/)];
  if (words.length !== wanted.length || words.length < 3) return text(said);
  return make("bdi", {}, words.map((word, index) => [index ? " " : "", word === wanted[index] ? word : make("mark", {}, word)]));
}
function answerRow(card, checkpoint) {
  const said = card.answers[checkpoint];
  const off = checkpoint === chosen() ? "answer" : "answer off";
  return [make("dt", {class: off}, title(checkpoint), " ", chip(card.task, said.score)),
    make("dd", {class: off}, said.text === "" ? make("em", {}, said.measured ? "measured" : "nothing") : marked(said.text, card.reference),
      said.read !== undefined && said.read !== said.text && make("span", {class: "tag"}, "read as ", text(said.read)),
      said.cut && make("span", {class: "tag warn"}, "cut off"), said.unparsed && make("span", {class: "tag warn"}, "unparsed"))];
}
function cardOf(card) {
  const few = card.pictures.length > 1 ? card.pictures.slice(0, 4) : card.pictures;
  return make("article", {class: "card", "data-id": card.id},
    few.length > 0 && make("a", {class: few.length > 1 ? "picture several" : "picture", href: cardLink(card), tabindex: "-1", "aria-hidden": "true"}, few.map((_, index) => picture(card, index))),
    make("div", {class: "text"}, make("p", {class: "prompt"}, make("a", {href: cardLink(card)}, text(card.prompt || "(no prompt)"))),
      make("dl", {}, make("dt", {}, "reference"), make("dd", {class: "reference"}, text(card.reference)), answered(card).map((checkpoint) => answerRow(card, checkpoint))),
      make("p", {class: "id"}, controls.task.value === "" ? `${data.tasks[card.task].name} · ` : "", text(card.id), ` · ${card.where}`)));
}
function picture(card, index) {
  const {at, width, height, seconds} = card.pictures[index];
  const unit = Math.max(width, height) / 40;
  const said = (card.answers[chosen()].points || []).filter(([number_]) => number_ === index);
  const shapes = [];
  if (index === 0) {
    for (const path of card.outlines || []) shapes.push(draw("path", {class: "region", d: path}));
    for (const [x, y, w, h] of card.boxes || []) shapes.push(draw("rect", {class: "region", x, y, width: w, height: h}));
    for (const [x, y] of card.targets || []) {
      if (card.radius) shapes.push(draw("circle", {class: "region", cx: x, cy: y, r: card.radius}));
      shapes.push(draw("circle", {class: "ref-dot", cx: x, cy: y, r: unit / 2}));
    }
    for (const [x, y, w, h] of card.answers[chosen()].boxes || []) shapes.push(draw("rect", {class: "said", x, y, width: w, height: h}));
  }
  for (const [, x, y] of said) {
    const cross = `M${x - unit} ${y - unit}L${x + unit} ${y + unit}M${x - unit} ${y + unit}L${x + unit} ${y - unit}`;
    shapes.push(draw("path", {class: "halo", d: cross}), draw("path", {class: "said", d: cross}));
  }
  const stack = make("span", {class: "stack"},
    make("img", {src: picturesOf(at[0])[at[1]], width, height, alt: `Picture ${index + 1} of ${card.example}`, class: width < 200 ? "tiny" : false, decoding: "async"}),
    shapes.length > 0 && draw("svg", {class: "overlay", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true"}, shapes),
    seconds !== undefined && make("span", {class: "seconds"}, `${seconds} s`));
  stack.style.setProperty("--ratio", width / height);
  return stack;
}
function cardPanel(card) {
  const place = matching.indexOf(card);
  const step = (by, label) => {
    const other = place < 0 ? undefined : matching[place + by];
    return other && make("a", {href: cardLink(other), class: "step", rel: by < 0 ? "prev" : "next"}, label);
  };
  panel(`${data.tasks[card.task].name}: ${card.id}`,
    make("div", {class: "large"}, card.pictures.map((_, index) => picture(card, index))),
    make("p", {class: "prompt"}, text(card.prompt)),
    make("dl", {class: "card"}, make("dt", {}, "reference"), make("dd", {class: "reference"}, text(card.reference)), names.map((_, checkpoint) => answerRow(card, checkpoint))),
    make("p", {class: "id"}, text(card.example), ` · ${card.where} · marks in pictures: ${names[chosen()]} · `, make("a", {href: lineageLink(card.task, chosen())}, "lineage")),
    make("p", {class: "steps"}, step(-1, "← previous"), step(1, "next →")));
}

// --- what is open

function panel(heading, ...children) {
  byId("panel-title").replaceChildren(visible(heading));
  byId("panel-body").replaceChildren(...make("div", {}, ...children).childNodes);
  if (!byId("panel").open) byId("panel").showModal();
  byId("panel").scrollTop = 0;
}
function missing(what) {
  panel("Not in this report", make("p", {}, "This report has no ", code(what), "."));
}
const taskNumber = (name) => data.tasks.findIndex((task) => task.name === name);
const ROUTES = {
  lineage([name, ...checkpoint]) {
    const [task, number_] = [taskNumber(name), names.indexOf(checkpoint.join("/"))];
    return task >= 0 && number_ >= 0 && (lineagePanel(task, number_), true);
  },
  card([name, id]) {
    const task = taskNumber(name);
    const card = task >= 0 && cardsOf(task).find((one) => one.id === id);
    return card && (cardPanel(card), true);
  },
  pair([name, a, b]) {
    const [task, first, second] = [taskNumber(name), names.indexOf(a), names.indexOf(b)];
    return task >= 0 && first >= 0 && second >= 0 && first !== second && (pairPanel(task, first, second), true);
  },
  run([run]) {
    return Object.hasOwn(data.runs, run) && (runPanel(run), true);
  },
  task([name]) {
    const details = byId(`task/${name}`);
    if (!details) return false;
    close();
    details.open = true;
    openTask(details);
    details.scrollIntoView();
    return true;
  },
  compare([a, b]) {
    if (!names.includes(a) || !names.includes(b)) return false;
    close();
    byId("c-a").value = names.indexOf(a);
    byId("c-b").value = names.indexOf(b);
    compare();
    byId("compare").scrollIntoView();
    return true;
  },
  examples([task, checkpoint, outcome, other]) {
    close();
    if (task && taskNumber(task) >= 0) controls.task.value = taskNumber(task);
    if (names.includes(checkpoint)) controls.checkpoint.value = names.indexOf(checkpoint);
    if (controls.than && names.includes(other)) controls.than.value = names.indexOf(other);
    controls.outcome.value = OUTCOMES[outcome] ? outcome : "";
    controls.text.value = "";
    filter();
    byId("examples").scrollIntoView();
    return true;
  },
};
function close() {
  if (byId("panel").open) byId("panel").close();
}
function arrive() {
  let parts;
  try {
    parts = location.hash.slice(1).split("/").map(decodeURIComponent);
  } catch {
    return missing(location.hash);
  }
  const [route, ...rest] = parts;
  if (!rest.length || !Object.hasOwn(ROUTES, route)) return close();
  if (!ROUTES[route](rest)) missing(parts.join("/"));
}

byId("panel").addEventListener("close", () => {
  if (/^#(lineage|card|pair|run)\//.test(location.hash)) history.replaceState(null, "", location.href.split("#")[0]);
});
byId("panel").addEventListener("click", (event) => { if (event.target === event.currentTarget) close(); });
byId("panel").addEventListener("keydown", (event) => {
  const rel = {ArrowLeft: "prev", ArrowRight: "next"}[event.key];
  const target = rel && byId("panel").querySelector(`a[rel=${rel}]`);
  if (target && !event.altKey && !event.ctrlKey && !event.metaKey) target.click();
});
for (const form of document.querySelectorAll("form.filters")) form.addEventListener("submit", (event) => event.preventDefault());
for (const name of ["task", "checkpoint", "outcome", "than", "order"]) if (controls[name]) controls[name].addEventListener("change", filter);
controls.text.addEventListener("input", filter);
byId("f-more").addEventListener("click", () => { const first = more(); if (first) first.querySelector(".prompt a").focus(); });
for (const side of ["c-a", "c-b"]) if (byId(side)) byId(side).addEventListener("change", compare);
for (const details of document.querySelectorAll("details.task")) details.addEventListener("toggle", () => openTask(details));
if (Object.keys(commits).length) byId("commits-note").textContent = "; this published copy names them";
window.addEventListener("hashchange", arrive);
compare();
filter();
arrive();

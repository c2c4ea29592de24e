"use strict";
// Everything that comes from a study is put on the page as text, never as markup.
const API = "api/v1";
const LIST_MS = 5000;
const SHOWN_TRIALS = 8;
const SHOWN_LINES = 200;
const KEY = "tuner-token";
const find = (id) => document.getElementById(id);
const pick = (name) => find(name).value;
let token = sessionStorage.getItem(KEY) || "";
let chosen = null; // the study that is shown: its name, trials, front, status, and what follows it

function make(tag, content, attributes = {}) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (content !== undefined) element.textContent = content;
  return element;
}

function draw(parent, tag, attributes, content) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (content !== undefined) element.textContent = content;
  parent.append(element);
  return element;
}

function say(text, bad = false) {
  find("said").textContent = text;
  find("said").classList.toggle("bad", bad);
}

const path = (name, rest = "") => `${API}/studies/${encodeURIComponent(name)}${rest}`;

async function ask(url, options = {}) {
  const headers = { ...(token ? { Authorization: `Bearer ${token}` } : {}), ...options.headers };
  const answer = await fetch(url, { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const error = new Error(told.detail || `the service answered ${answer.status}`);
  error.status = answer.status;
  throw error;
}

const post = (url, body) => ask(url, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

function number(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

// The list of studies.

async function refresh() {
  try {
    showList(await (await ask(`${API}/studies`)).json());
    find("access").hidden = true;
    find("list").hidden = false;
    find("submit-box").hidden = !token;
    find("forget").hidden = !token;
    follow(location.hash);
  } catch (error) {
    if (error.status === 401) lock(token ? "That token is not one of this service." : "This service asks for a token.");
    else say(`${error.message}. Trying again.`, true);
  }
}

function lock(text) {
  token = "";
  sessionStorage.removeItem(KEY);
  leave();
  for (const id of ["list", "study", "submit-box", "forget"]) find(id).hidden = true;
  const opened = find("access").hidden;
  find("access").hidden = false;
  if (opened) find("token").focus();
  say(text);
}

function showList(studies) {
  studies.sort((a, b) => (b.started_at || "").localeCompare(a.started_at || ""));
  const rows = studies.map((study) => {
    const row = make("tr");
    const name = make("th", undefined, { scope: "row" });
    name.append(make("a", study.study, { href: `#study/${encodeURIComponent(study.study)}` }));
    row.append(name);
    const state = make("td");
    state.append(make("span", study.running ? "running" : "not running", { class: study.running ? "state running" : "state" }));
    row.append(state, make("td", study.objectives.join(", ")));
    for (const key of ["measured", "failed", "open"]) row.append(make("td", String(study[key]), { class: "figure" }));
    row.append(make("td", study.started_at ? new Date(study.started_at).toLocaleString() : ""));
    if (chosen && chosen.name === study.study) row.setAttribute("aria-current", "true");
    return row;
  });
  const focused = document.activeElement && document.activeElement.closest("#studies a");
  const hash = focused && focused.getAttribute("href");
  find("studies").replaceChildren(...rows);
  if (hash) for (const link of find("studies").querySelectorAll("a")) if (link.getAttribute("href") === hash) link.focus();
  find("none").hidden = studies.length > 0;
  const running = studies.filter((study) => study.running).length;
  say(`${studies.length} ${studies.length === 1 ? "study" : "studies"}, ${running} running.`);
}

// One study, live.

function follow(hash) {
  const name = hash.startsWith("#study/") ? decodeURIComponent(hash.slice(7)) : null;
  if (chosen && chosen.name === name) return;
  leave();
  find("study").hidden = name === null;
  if (name === null) return;
  chosen = { name, trials: new Map(), front: [], axes: [], emulated: false, ended: false, stop: new AbortController(), lines: [] };
  find("study-title").textContent = name;
  find("counts").textContent = "";
  find("log").textContent = "";
  find("log-box").open = false;
  const links = { report: "/report", markdown: "/report.md", csv: "/front.csv" };
  for (const [id, rest] of Object.entries(links)) find(id).href = path(name, rest);
  for (const id of ["state", "studies"]) find(id).dataset.study = name;
  render(chosen);
  stream(chosen, path(name, "/trials/stream"), told);
}

function leave() {
  if (chosen) chosen.stop.abort();
  chosen = null;
}

async function stream(study, url, on) {
  while (!study.stop.signal.aborted) {
    try {
      const answer = await ask(url, { signal: study.stop.signal });
      if (await readEvents(answer.body, (kind, data) => on(study, kind, data))) return;
    } catch (error) {
      if (study.stop.signal.aborted) return;
      if (error.status === 401) return lock("The token is not valid any more.");
      if (error.status === 404) return say(error.message, true);
      say(`${error.message}. Trying again.`, true);
    }
    await new Promise((done) => setTimeout(done, 3000));
  }
}

// Reads server-sent events until the stream ends; true where the service said that nothing more comes.
async function readEvents(body, on) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return false;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = part.split("\n").map((line) => /^(\w+): ?(.*)$/.exec(line)).filter(Boolean);
      const told = Object.fromEntries(fields.map(([, key, content]) => [key, content]));
      if (told.data === undefined) continue;
      on(told.event || "line", JSON.parse(told.data));
      if (told.event === "end") return true;
    }
  }
}

function told(study, kind, data) {
  if (study !== chosen) return;
  if (kind === "trial") study.trials.set(data.trial, data);
  if (kind === "front") Object.assign(study, { front: data.front, axes: data.objectives, emulated: data.emulated });
  if (kind === "status") study.status = data;
  if (kind === "end") study.ended = true;
  if (kind === "fault") say(data.detail, true);
  if (!study.waiting) study.waiting = setTimeout(() => { study.waiting = null; if (study === chosen) render(study); }, 50);
}

function render(study) {
  const { status } = study;
  find("study").dataset.ended = String(study.ended);
  find("emulated").hidden = !study.emulated;
  find("state").textContent = status ? status.state : "...";
  find("state").className = `state ${status ? status.state : ""}`;
  find("stop").hidden = !token || !status || status.state !== "running";
  find("resume").hidden = !token || !status || !["died", "stopped"].includes(status.state);
  if (status) {
    const { finished, budget, measured, failed, running } = status.trials;
    find("counts").textContent = `${finished}${budget ? ` of ${budget}` : ""} trials: ${measured} measured, ${failed} failed, ${running.length} running`;
    find("progress").value = budget ? Math.min(1, finished / budget) : 0;
  }
  renderAxes(study);
  renderFront(study);
  renderTrials(study);
  plot(study);
}

function renderAxes(study) {
  const names = study.axes.map((axis) => axis.metric);
  find("axes").hidden = names.length < 3;
  for (const [id, index] of [["across", 0], ["up", 1]]) {
    if (find(id).dataset.names === names.join()) continue;
    find(id).dataset.names = names.join();
    find(id).replaceChildren(...names.map((name) => make("option", name, { value: name })));
    find(id).selectedIndex = index;
  }
}

function renderFront(study) {
  const names = study.axes.map((axis) => axis.metric);
  const heads = names.map((name) => make("th", name, { scope: "col", class: "figure" }));
  find("front-head").replaceChildren(make("th", "trial", { scope: "col" }), ...heads, make("th", "runs", { scope: "col", class: "figure" }), make("th", "configuration", { scope: "col" }));
  find("front").replaceChildren(...study.front.map((member) => {
    const row = make("tr");
    row.append(make("th", String(member.trial), { scope: "row" }));
    for (const name of names) row.append(make("td", number(member.objectives[name]), { class: "figure" }));
    row.append(make("td", String(member.runs), { class: "figure" }), make("td", member.configuration, { class: "wide" }));
    return row;
  }));
  find("no-front").hidden = study.front.length > 0;
}

function renderTrials(study) {
  const last = [...study.trials.values()].sort((a, b) => b.trial - a.trial).slice(0, SHOWN_TRIALS);
  find("trials").replaceChildren(...last.map((trial) => {
    const what = trial.failure ? `failed: ${trial.failure}` : trial.status;
    const repeat = trial.repeat_of === null ? "" : `, again trial ${trial.repeat_of}`;
    const item = make("li");
    item.append(make("strong", `${trial.trial} ${what}${repeat}`), ` ${trial.configuration}`);
    return item;
  }));
}

// The chart: measured trials, and the front over them.

function ticksOf(low, high) {
  const rough = (high - low || Math.abs(high) || 1) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((size) => size * unit >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) found.push(Math.abs(tick) < step / 1e6 ? 0 : tick);
  return found;
}

function scale(values, from, to) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.06 || 1;
  const [a, b] = [low - pad < 0 && low >= 0 ? 0 : low - pad, high + pad];
  return { at: (value) => from + ((value - a) / (b - a)) * (to - from), ticks: ticksOf(a, b) };
}

function plot(study) {
  const box = find("chart");
  const [x, y] = [pick("across"), pick("up")];
  const has = (point) => [x, y].every((name) => typeof point.objectives[name] === "number");
  const first = [...study.trials.values()].filter((trial) => trial.status === "measured" && trial.repeat_of === null && has(trial));
  const front = study.front.filter(has);
  const points = [...first, ...front];
  find("no-points").hidden = points.length > 0;
  find("legend").hidden = points.length === 0;
  if (!points.length) return box.replaceChildren();
  const width = Math.max(280, box.clientWidth), height = Math.round(Math.min(420, Math.max(260, width * 0.5)));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Chart of ${y} over ${x}: ${first.length} measured trials, ${front.length} on the front. The figures of the front are in the table below.`);
  const across = scale(points.map((point) => point.objectives[x]), 64, width - 16);
  const up = scale(points.map((point) => point.objectives[y]), height - 46, 34);
  frame(svg, study, { x, y, across, up, width, height });
  const place = (point) => [across.at(point.objectives[x]), up.at(point.objectives[y])];
  const stairs = front.map(place).sort((a, b) => a[0] - b[0]);
  if (stairs.length > 1) draw(svg, "polyline", { class: "stairs", points: stairs.map((at) => at.join()).join(" ") });
  const members = new Set(front.map((member) => member.trial));
  for (const trial of first) if (!members.has(trial.trial)) mark(svg, place(trial), trial, trial.feasible ? "met" : "missed", x, y);
  for (const member of front) mark(svg, place(member), member, "front-mark", x, y);
  box.replaceChildren(svg);
}

function frame(svg, study, { x, y, across, up, width, height }) {
  const arrow = (metric) => (study.axes.find((axis) => axis.metric === metric) || {}).direction === "minimize" ? "less is better" : "more is better";
  const every = Math.ceil((across.ticks.length * 70) / (width - 80));
  across.ticks.forEach((tick, index) => {
    draw(svg, "line", { class: "tick", x1: across.at(tick), x2: across.at(tick), y1: 34, y2: height - 46 });
    if (index % every === 0) draw(svg, "text", { x: across.at(tick), y: height - 28, "text-anchor": "middle" }, number(tick));
  });
  for (const tick of up.ticks) {
    draw(svg, "line", { class: "tick", x1: 64, x2: width - 16, y1: up.at(tick), y2: up.at(tick) });
    draw(svg, "text", { x: 58, y: up.at(tick) + 4, "text-anchor": "end" }, number(tick));
  }
  draw(svg, "text", { class: "name", x: 4, y: 16 }, `${y} (${arrow(y)})`);
  draw(svg, "text", { class: "name", x: width - 16, y: height - 8, "text-anchor": "end" }, `${x} (${arrow(x)})`);
}

function mark(svg, [left, top], point, kind, x, y) {
  const shape = kind === "missed"
    ? draw(svg, "path", { class: kind, d: `M${left - 4} ${top - 4} l8 8 M${left + 4} ${top - 4} l-8 8` })
    : draw(svg, "circle", { class: kind, cx: left, cy: top, r: kind === "met" ? 4 : 6 });
  draw(shape, "title", {}, `trial ${point.trial}: ${x} ${number(point.objectives[x])}, ${y} ${number(point.objectives[y])}; ${point.configuration}`);
}

// What a user does.

async function download(event) {
  if (!token) return; // the browser's own link is enough
  event.preventDefault();
  const link = event.currentTarget;
  try {
    const url = URL.createObjectURL(await (await ask(link.href)).blob());
    const kinds = { report: "html", markdown: "md", csv: "csv" };
    make("a", "", { href: url, download: `${chosen.name}.${kinds[link.id]}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  } catch (error) {
    say(error.message, true);
  }
}

async function order(rest, body, done) {
  const { name } = chosen;
  try {
    await post(path(name, rest), body);
    say(done);
    leave(); // follow it anew
    refresh();
  } catch (error) {
    say(error.message, true);
  }
}

async function submit(event) {
  event.preventDefault();
  const said = find("submitted");
  said.hidden = false;
  said.textContent = "Checking.";
  try {
    const run = await (await post(`${API}/studies`, { study: pick("text") })).json();
    said.textContent = `Study ${run.study} is started.`;
    await watch(run.study, said);
  } catch (error) {
    said.textContent = error.message;
  }
}

async function watch(name, said) {
  for (;;) {
    const run = await (await ask(`${API}/submissions/${encodeURIComponent(name)}`)).json();
    if (run.state === "failed") {
      said.textContent = `Study ${name} did not run (exit code ${run.exit_code}):\n${run.tail}`;
      return;
    }
    if (run.state !== "starting") {
      location.hash = `#study/${encodeURIComponent(name)}`;
      refresh();
      return;
    }
    await new Promise((done) => setTimeout(done, 1000));
  }
}

find("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = pick("token");
  find("token").value = "";
  sessionStorage.setItem(KEY, token);
  refresh();
});
find("forget").addEventListener("click", () => lock("The token is forgotten."));
find("submit").addEventListener("submit", submit);
find("stop").addEventListener("click", () => order("/stop", {}, "The study was told to stop."));
find("resume").addEventListener("click", () => order("/resume", {}, "The study goes on."));
for (const id of ["report", "markdown", "csv"]) find(id).addEventListener("click", download);
for (const id of ["across", "up"]) find(id).addEventListener("change", () => chosen && plot(chosen));
find("log-box").addEventListener("toggle", () => {
  if (!chosen || !find("log-box").open || chosen.logged) return;
  chosen.logged = true;
  stream(chosen, path(chosen.name, "/events/stream"), (study, kind, line) => {
    if (study !== chosen || kind !== "line") return;
    study.lines = [...study.lines, `${new Date(line.at_s * 1000).toLocaleTimeString()} ${line.text}`].slice(-SHOWN_LINES);
    find("log").textContent = study.lines.join("\n");
    find("log").scrollTop = find("log").scrollHeight;
  });
});
addEventListener("hashchange", () => { follow(location.hash); refresh(); });
addEventListener("resize", () => chosen && plot(chosen));
setInterval(() => document.visibilityState === "visible" && find("access").hidden && refresh(), LIST_MS);
refresh();

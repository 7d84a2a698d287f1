"use strict";
const shown = JSON.parse(document.getElementById("facts").textContent);
const page = document.getElementById("page");
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = [];
const COLOURS = ["#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308",
  "#ec4899", "#64748b", "#84cc16"];

function make(name, parent, attributes = {}, text = null) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (seconds === null) return "-";
  if (seconds < 90) return seconds.toFixed(0) + " s";
  return seconds < 5400 ? (seconds / 60).toFixed(0) + " min" : (seconds / 3600).toFixed(1) + " h";
}

const percent = (value) => (value === null ? "-" : number(100 * value) + "%");

// --- charts ---------------------------------------------------------------------------------

function chart(parent, option, wide = false) {
  const node = make("div", parent, { class: wide ? "chart wide" : "chart" });
  charts.push({ node, option });
}

function drawAll() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), soft = style.getPropertyValue("--soft").trim();
  const line = style.getPropertyValue("--line").trim();
  for (const one of charts) {
    if (one.drawn) one.drawn.dispose();
    one.drawn = echarts.init(one.node, null, { renderer: "canvas" });
    const base = {
      color: COLOURS, backgroundColor: "transparent", animation: false,
      textStyle: { color: soft },
    };
    const option = one.option({ ink, soft, line });
    one.drawn.setOption({ ...base, ...option });
  }
}

function lines(title, series, { log = false, unit = number, marks = [], area = false } = {}) {
  return (theme) => ({
    title: { text: title, left: 12, top: 8, textStyle: { color: theme.ink, fontSize: 14 } },
    legend: { type: "scroll", top: 30, left: 8, right: 8, textStyle: { color: theme.soft },
      show: series.length > 1, pageIconColor: theme.soft, pageTextStyle: { color: theme.soft } },
    grid: { left: 58, right: 18, top: series.length > 1 ? 62 : 44, bottom: 34 },
    tooltip: { trigger: "axis", confine: true, valueFormatter: unit },
    xAxis: { type: "value", min: "dataMin", max: "dataMax", axisLine: { lineStyle: { color: theme.line } },
      splitLine: { show: false }, axisLabel: { color: theme.soft, hideOverlap: true } },
    yAxis: { type: log ? "log" : "value", scale: true, axisLabel: { color: theme.soft, formatter: unit },
      splitLine: { lineStyle: { color: theme.line } } },
    series: series.map((one, place) => ({
      name: one.name, type: "line", data: one.points, showSymbol: one.points.length < 40,
      symbolSize: 5, lineStyle: { width: 1.6, type: one.dashed ? "dashed" : "solid" },
      ...(one.colour === undefined ? {} : { color: COLOURS[one.colour % COLOURS.length] }),
      ...(area ? { areaStyle: { opacity: 0.15 } } : {}),
      ...(place === 0 && marks.length ? { markLine: {
        symbol: "none", silent: true, lineStyle: { color: theme.soft, type: "dotted" },
        label: { show: false }, data: marks.map((step) => ({ xAxis: step })) } } : {}),
    })),
  });
}

function points(run, name) {
  const steps = run.series.step, values = run.series[name] || [];
  return steps.map((step, place) => [step, values[place] ?? null]).filter((one) => one[1] !== null);
}

function columns(runs, names, label) {
  const found = [];
  runs.forEach((run, number_) => {
    for (const name of names) {
      const at = points(run, name);
      if (at.length) found.push({
        name: runs.length > 1 ? (names.length > 1 ? run.name + " " + label(name) : run.name) : label(name),
        points: at, ...(runs.length > 1 && names.length === 1 ? { colour: number_ } : {}) });
    }
  });
  return found;
}

function curves(parent, runs) {
  const box = make("div", parent, { class: "charts" });
  const marks = runs.length === 1
    ? runs[0].events.filter((one) => one.event === "continued" && one.step).map((one) => one.step) : [];
  const has = (prefix) => [...new Set(runs.flatMap((run) => Object.keys(run.series)))]
    .filter((name) => name.startsWith(prefix));
  const add = (title, names, options = {}, label = (name) => name) => {
    const found = columns(runs, names, label);
    if (found.length) chart(box, lines(title, found, { marks, ...options }));
  };
  const short = (name) => name.slice(name.indexOf("/") + 1);
  add("Loss", ["loss"]);
  if (has("loss/").length > 1) add("Loss by task", has("loss/"), {}, short);
  if (has("term/").length) add("Terms of the loss", has("term/"), {}, short);
  const measured = [...new Set(runs.flatMap((run) => run.evaluations.map((one) => one.name)))];
  const group = (title, wanted, unit) => {
    const found = [];
    runs.forEach((run, place) => run.evaluations.filter(wanted).forEach((one) => found.push({
      name: runs.length > 1 ? run.name : one.name, ...(runs.length > 1 ? { colour: place } : {}),
      points: one.steps.map((step, n) => [step, one.values[n]]).filter((p) => p[1] !== null),
    })));
    if (found.some((one) => one.points.length)) chart(box, lines(title, found, { marks, unit }));
  };
  if (runs.length > 1) {
    for (const name of measured.slice(0, 9)) {
      const percents = runs.some((run) => run.evaluations.some((one) => one.name === name && one.percent));
      group("Evaluation: " + name, (one) => one.name === name, percents ? percent : number);
    }
  } else {
    group("Evaluation: error rates", (one) => one.percent, percent);
    group("Evaluation: losses", (one) => one.name.startsWith("loss/"), number);
    group("Evaluation: other figures",
      (one) => !one.percent && !one.loss, number);
  }
  add("Learning rate", ["lr"]);
  add("Gradient norm", ["grad_norm"], { log: false });
  add("Tokens a second", runs.length > 1 ? ["tokens_per_s"] : ["tokens_per_s", "supervised_tokens_per_s"]);
  add("Audio seconds a second", ["audio_seconds_per_s"]);
  add("MFU", ["mfu"], { unit: percent });
  add("TFLOP/s a worker", ["tflops"]);
  add("Waiting for data, share of time", ["data_wait"], { unit: percent, area: true });
  add("Padding, share of computed positions", ["padding"], { unit: percent, area: true });
  add("Peak memory, GB", ["peak_memory_gb"]);
  add("Workers", ["world_size"]);
  add("Steps trained again after restarts", ["steps_again"]);
}

// --- tables ---------------------------------------------------------------------------------

function table(parent, names, rows, cell, sortable = false) {
  const box = make("div", parent, { class: "scroll" });
  const node = make("table", box), head = make("tr", make("thead", node)), body = make("tbody", node);
  let by = null, down = false;
  const fill = () => {
    body.replaceChildren();
    for (const row of rows) {
      const line = make("tr", body);
      for (const name of names) cell(make("td", line), row, name);
    }
  };
  const worth = (text) => (text === "" || text === undefined || text === null ? Infinity
    : Number.isNaN(Number(text)) ? String(text) : Number(text));
  for (const name of names) {
    const title = make("th", head, sortable ? { class: "sorts", tabindex: 0 } : {}, name);
    if (!sortable) continue;
    const sort = () => {
      down = by === name && !down;
      by = name;
      rows = [...rows].sort((one, other) => {
        const a = worth(one[name]), b = worth(other[name]);
        const order = typeof a === "number" && typeof b === "number"
          ? (a === b ? 0 : a - b) : String(a).localeCompare(String(b));
        return down ? -order : order;
      });
      head.querySelectorAll("th").forEach((th) => { th.textContent = th.textContent.replace(/ [▲▼]$/, ""); });
      title.textContent = name + (down ? " ▼" : " ▲");
      fill();
    };
    title.addEventListener("click", sort);
    title.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  }
  fill();
}

function examples(parent, run) {
  if (!run.examples.length) return;
  make("h2", parent, {}, "What it answered");
  make("p", parent, { class: "note" },
    "Newest evaluation: half of these are those with most errors. Struck out: said, not heard; coloured: heard, not said.");
  table(parent, ["", "source", "words wrong", "reference and answer", "clip"], run.examples, (cell, row, name) => {
    if (name === "") cell.textContent = row.id;
    else if (name === "source") cell.textContent = row.source;
    else if (name === "words wrong") cell.textContent = row.errors;
    else if (name === "clip") { if (row.clip) make("audio", cell, { controls: "", preload: "metadata", src: row.clip }); }
    else differences(cell, row.parts);
  });
}

function differences(cell, parts) {
  cell.className = "text";
  for (const part of parts) {
    const span = make("span", cell, { class: part.kind });
    if (part.kind === "substitute") {
      make("span", span, { class: "said" }, part.said);
      span.append(" ");
      make("span", span, { class: "heard" }, part.heard);
    } else span.textContent = part.kind === "insert" ? part.heard : part.said;
    cell.append(" ");
  }
}

function spoken(parent, run) {
  if (!run.spoken.length) return;
  make("h2", parent, {}, "What it spoke");
  make("p", parent, { class: "note" },
    "Newest evaluation that was heard: half of these are those with most errors. Struck out: to be said, not heard; coloured: heard, not to be said. In brackets and in the last column: the real clip by the same vocoder, which is the best that the model can do.");
  const of = { wer: (value) => (100 * value).toFixed(1) + "%", distortion: (value) => value.toFixed(1) + " dB", similarity: (value) => value.toFixed(2) };
  const columns = ["", "task", ...Object.keys(of).filter((key) => run.spoken.some((row) => key in row.numbers)), "to be said, and heard", "spoken", "real, same vocoder"];
  table(parent, columns, run.spoken, (cell, row, name) => {
    const player = (url) => { if (url) make("audio", cell, { controls: "", preload: "metadata", src: url }); };
    if (name === "") cell.textContent = row.id;
    else if (name === "task") cell.textContent = row.task;
    else if (name === "spoken") player(row.spoken);
    else if (name === "real, same vocoder") player(row.bound);
    else if (name in of) {
      const [own, bound] = [row.numbers[name], row.numbers[name + "_bound"]];
      cell.textContent = own == null ? "" : of[name](own) + (bound == null ? "" : ` (${of[name](bound)})`);
    } else differences(cell, row.parts);
  });
}

function details(parent, run) {
  if (run.experts.length) {
    make("h2", parent, {}, "Experts");
    const box = make("div", parent, { class: "charts" });
    for (const one of run.experts) chart(box, heat(one), true);
  }
  examples(parent, run);
  spoken(parent, run);
  if (run.quarantine.length) {
    make("h2", parent, {}, "Quarantine");
    table(parent, ["kind", "count", "first"], run.quarantine, (cell, row, name) => {
      if (name === "first") cell.className = "text";
      cell.textContent = name === "count" ? number(row.count) : row[name];
    });
  }
  if (run.events.length) {
    make("h2", parent, {}, "Restarts and warnings");
    table(parent, ["step", "event", "workers", "lost", "reason"], run.events, (cell, row, name) => {
      if (name === "reason") cell.className = "text";
      cell.textContent = name === "lost" ? (row.lost_s === null ? "" : duration(row.lost_s)) : row[name] ?? "";
    });
  }
}

function heat(one) {
  const cells = one.shares.flatMap((row, layer) => row.map((share, expert) => [expert, layer, share]));
  return (theme) => ({
    title: { text: "Tokens by expert" + (one.kind === "all" ? "" : ": " + one.kind) + " (1: an equal share)",
      left: 12, top: 8, textStyle: { color: theme.ink, fontSize: 14 } },
    grid: { left: 58, right: 90, top: 44, bottom: 40 },
    tooltip: { confine: true, formatter: (at) => `layer ${at.value[1]}, expert ${at.value[0]}: ${number(at.value[2])}` },
    xAxis: { type: "category", name: "expert", axisLabel: { color: theme.soft } },
    yAxis: { type: "category", name: "layer", inverse: true, axisLabel: { color: theme.soft } },
    visualMap: { min: 0, max: 3, right: 8, top: "middle", calculable: false, textStyle: { color: theme.soft },
      inRange: { color: ["#7f1d1d", "#f59e0b", "#fef3c7", "#60a5fa", "#1e3a8a"] } },
    series: [{ type: "heatmap", data: cells }],
  });
}

// --- sweeps ---------------------------------------------------------------------------------

function sweep(parent, found) {
  make("h2", parent, {}, "Trials");
  const names = ["rank", "trial", "status", "step", found.metric,
    ...found.keys, "seed", "seconds", "attempts", "reason",
    ...found.columns.filter((name) => name === "taken_over")];
  table(parent, names, found.rows, (cell, row, name) => {
    if (name === "reason" || name === "taken_over") cell.className = "text";
    const value = Number(row[name]);
    cell.textContent = name === found.metric && row[name] !== "" ? number(value) : row[name];
  }, true);
  const good = found.rows.filter((row) => row[found.metric] !== "");
  if (!good.length) return;
  const box = make("div", parent, { class: "charts below" });
  const numeric = (key) => good.every((row) => row[key] !== "" && !Number.isNaN(Number(row[key])));
  const spread = (key) => {
    const values = good.map((row) => Number(row[key]));
    return Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 8;
  };
  const kinds = (key) => [...new Set(good.map((row) => row[key]))];
  chart(box, (theme) => ({
    title: { text: "Points, coloured by " + found.metric, left: 12, top: 8, textStyle: { color: theme.ink, fontSize: 14 } },
    parallel: { left: 60, right: 110, top: 76, bottom: 30 },
    visualMap: { show: true, right: 8, top: "middle", dimension: found.keys.length,
      min: Math.min(...good.map((row) => Number(row[found.metric]))),
      max: Math.max(...good.map((row) => Number(row[found.metric]))) + 1e-12, precision: 3,
      inRange: { color: ["#10b981", "#eab308", "#ef4444"] }, textStyle: { color: theme.soft } },
    parallelAxis: [...found.keys, found.metric].map((key, place) => ({
      dim: place, name: key.split(".").slice(-2).join("."), nameTextStyle: { color: theme.ink },
      axisLabel: { color: theme.soft, formatter: numeric(key) ? number : undefined },
      axisLine: { lineStyle: { color: theme.soft } },
      ...(numeric(key) ? { type: spread(key) ? "log" : "value", scale: true }
        : { type: "category", data: kinds(key) }) })),
    series: [{ type: "parallel", lineStyle: { width: 2, opacity: 0.8 }, data: good.map((row) =>
      [...found.keys, found.metric].map((key) => (numeric(key) ? Number(row[key]) : row[key]))) }],
  }), true);
  for (const key of found.keys) {
    const at = (status) => good.filter((row) => (row.status === "finished") === status)
      .map((row) => ({ name: row.trial, value: [numeric(key) ? Number(row[key]) : row[key], Number(row[found.metric])] }));
    chart(box, (theme) => ({
      title: { text: found.metric + " by " + key, left: 12, top: 8, textStyle: { color: theme.ink, fontSize: 14 } },
      legend: { top: 30, left: 8, textStyle: { color: theme.soft } },
      grid: { left: 58, right: 24, top: 62, bottom: 34 },
      tooltip: { confine: true, formatter: (one) => `${one.name}: ${one.value[0]}, ${number(one.value[1])}` },
      xAxis: numeric(key) ? { type: spread(key) ? "log" : "value", scale: true, axisLabel: { color: theme.soft, formatter: number, hideOverlap: true }, splitLine: { show: false } }
        : { type: "category", data: kinds(key), axisLabel: { color: theme.soft } },
      yAxis: { type: "value", scale: true, axisLabel: { color: theme.soft, formatter: number }, splitLine: { lineStyle: { color: theme.line } } },
      series: [{ name: "finished", type: "scatter", data: at(true) },
        { name: "not finished", type: "scatter", symbol: "diamond", data: at(false) }],
    }));
  }
}

// --- stages ---------------------------------------------------------------------------------

function stages(parent, rows) {
  make("h2", parent, {}, "Stages");
  table(parent, ["stage", "status", "last step", "best step", "best by"], rows, (cell, row, name) => {
    if (name === "stage" && row.begun) make("a", cell, { href: row.stage + "/report.html" }, row.stage);
    else cell.textContent = ({ "last step": row.step, "best step": row.best, "best by": row.by }[name] ?? row[name]) ?? "";
  });
}

// --- preparations ----------------------------------------------------------------------------

function histogram(title, found, unit) {
  const text = (value) => number(Number(value.toPrecision(3)));
  const between = (place) => `${text(found.edges[place])} to ${text(found.edges[place + 1])}${unit}`;
  return (theme) => ({
    title: { text: title, left: 12, top: 8, textStyle: { color: theme.ink, fontSize: 14 } },
    grid: { left: 58, right: 18, top: 44, bottom: 34 },
    tooltip: { confine: true, formatter: (one) => `${between(one.dataIndex)}: ${number(one.value)}` },
    xAxis: { type: "category", data: found.edges.slice(0, -1).map(text),
      axisLabel: { color: theme.soft, hideOverlap: true } },
    yAxis: { type: "value", axisLabel: { color: theme.soft, formatter: number },
      splitLine: { lineStyle: { color: theme.line } } },
    series: [{ type: "bar", data: found.counts, barCategoryGap: "8%" }],
  });
}

function prepared(parent, found) {
  const facts = make("div", parent, { class: "facts" });
  for (const [key, value] of Object.entries(found.asked)) {
    const one = make("span", facts);
    one.append(key + " ");
    make("b", one, {}, String(value));
  }
  const cards = make("div", parent, { class: "cards" });
  for (const [name, value] of Object.entries(found.figures)) {
    const one = make("div", cards, { class: "card" });
    make("span", one, {}, name);
    make("b", one, {}, number(value));
  }
  if (found.histograms.length) {
    make("h2", parent, {}, "Utterances");
    const box = make("div", parent, { class: "charts" });
    for (const one of found.histograms) chart(box, histogram(one.title, one, one.unit));
  }
  if (found.speakers.length) {
    make("h2", parent, {}, "Speakers with most");
    table(parent, ["speaker", "utterances", "hours"], found.speakers, (cell, row, name) => {
      cell.textContent = name === "speaker" ? row.speaker : number(row[name]);
    }, true);
  }
  if (found.quarantine.length) {
    make("h2", parent, {}, "Left out");
    table(parent, ["kind", "count", "first"], found.quarantine, (cell, row, name) => {
      if (name === "first") cell.className = "text";
      cell.textContent = name === "count" ? number(row.count) : row[name];
    });
  }
}

// --- the page -------------------------------------------------------------------------------

function head(run) {
  const facts = make("div", page, { class: "facts" });
  for (const [key, value] of Object.entries(run.config)) {
    const one = make("span", facts);
    one.append(key + " ");
    make("b", one, {}, String(value));
  }
  const cards = make("div", page, { class: "cards" });
  const card = (name, value) => { const one = make("div", cards, { class: "card" }); make("span", one, {}, name); make("b", one, {}, value); };
  const last = (name) => (run.series[name] || []).filter((value) => value !== null).at(-1) ?? null;
  card("step", number(last("step")));
  card("loss", number(last("loss")));
  for (const one of run.evaluations.filter((each) => each.percent).slice(0, 4)) card(one.name, percent(one.values.at(-1)));
  card("training time", duration(run.seconds));
  card("tokens a second", number(last("tokens_per_s")));
  card("waiting for data", percent(last("data_wait")));
  card("restarts", number(last("restarts") ?? 0));
}

make("h1", page, {}, shown.title);
make("p", page, { class: "note" }, "raysft, " + shown.at);
if (shown.prepared) prepared(page, shown.prepared);
if (shown.sweep) sweep(page, shown.sweep);
if (shown.stages && shown.stages.length) stages(page, shown.stages);
if (shown.runs.length === 1) head(shown.runs[0]);
if (shown.runs.length) {
  make("h2", page, {}, shown.runs.length > 1 ? "Curves" : "Training");
  curves(page, shown.runs);
}
if (shown.runs.length === 1) details(page, shown.runs[0]);
else if (!shown.sweep) for (const run of shown.runs) { make("h2", page, {}, run.name); details(page, run); }
drawAll();
dark.addEventListener("change", drawAll);
addEventListener("resize", () => charts.forEach((one) => one.drawn.resize()));

// Puts the page together from the plan's data, which stands in the page itself.
import { cluster, clusterTable } from "./cluster.js";
import { comparison } from "./compare.js";
import { h, right, section, table } from "./dom.js";
import { PARTS, gib, percent, seconds, digits } from "./format.js";
import { live } from "./live.js";
import { memory, memoryTable, peak } from "./memory.js";
import { model, modelTable, searchOps } from "./model.js";
import { sweep } from "./sweep.js";
import { timeline, timelineTable } from "./timeline.js";

const root = document.documentElement;
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";

function build(plan) {
  document.title = `${plan.model} on ${plan.settings.cluster}`;
  const drawn = model(plan), { rows, step_time_s: step } = plan.timeline;
  const fullest = rows.reduce((a, b) => (peak(a) / a.usable_gib > peak(b) / b.usable_gib ? a : b));
  const proof = plan.certificate;
  const tiles = [
    [seconds(plan.numbers.step_time_s), "a training step"],
    [digits(plan.numbers.tokens_per_s_per_device, 4), "tokens/s a device"],
    [percent(plan.numbers.mfu), "MFU: of the devices' peak"],
    [percent(plan.numbers.bubble_fraction), "bubble of the busiest device"],
    [`${gib(peak(fullest))}`, `peak of ${gib(fullest.usable_gib)}`],
    ...(proof?.gap !== null && proof ? [[percent(proof.gap, 2), "gap to the proved bound"]] : []),
  ];
  const s = plan.settings;
  const words = [`${s.devices} devices`, `${plan.stages.length} stage${plan.stages.length > 1 ? "s" : ""}`, s.schedule,
    `global batch ${s.global_batch}`, s.sequence ? `sequence ${s.sequence}` : null,
    `${s.num_micro_batches} micro-batch${s.num_micro_batches === 1 ? "" : "es"} of ${s.micro_batch}`, `${s.dtype} compute, ${s.param_dtype} parameters`, s.optimizer,
    s.sequence_parallel ? "sequence parallel" : null, s.compile ? "compiled" : null].filter(Boolean).join(" \u00b7 ");
  document.getElementById("page").replaceWith(h("main", {},
    h("header", { class: "top" }, h("div", {}, h("h1", {}, `${plan.model} on ${s.cluster}`), h("div", { class: "soft" }, words),
      plan.numbers.feasible ? null : h("p", { role: "alert" }, `does not fit: ${plan.numbers.infeasible_reason}`)), tools(plan, drawn.show)),
    h("div", { class: "tiles" }, tiles.map(([value, name]) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, name)))),
    breakdown(plan),
    section("cluster", "Cluster", "each square is a device, its colour and number the stage that it runs",
      cluster(plan.cluster, plan.stages.length), () => clusterTable(plan.cluster)),
    section("timeline", "One step in time", "a row for the devices of each pipeline rank: compute above, communication below",
      timeline(plan.timeline), () => timelineTable(plan.timeline)),
    plan.live ? live(plan.live) : null,
    section("memory", "Memory", "what a device of each pipeline rank holds at its peak",
      memory(rows, step), () => memoryTable(rows)),
    section("model", "Model", "the blocks of each stage; press one for its ops", drawn.drawing, () => modelTable(plan)),
    plan.baselines.length ? section("baselines", "Against the plans an expert would write", "the same model of costs for all",
      baselines(plan), () => baselineTable(plan)) : null,
    proof ? certificate(plan) : null,
    plan.notes.length ? h("section", { id: "notes" }, h("h2", {}, "Notes"), h("ul", { class: "plain" }, plan.notes.map((note) => h("li", {}, note)))) : null));
}

function tools(plan, show) {
  const hits = h("div", { class: "hits", hidden: true });
  const box = h("input", { type: "search", placeholder: "find a module: q_proj, mlp\u2026", "aria-label": "Find a module by its name",
    oninput: () => {
      const text = box.value.trim();
      hits.hidden = !text;
      if (!text) return;
      const found = searchOps(plan, text);
      hits.replaceChildren(...found.slice(0, 40).map((hit) => h("button", { onclick: () => {
        hits.hidden = true;
        document.getElementById("model").scrollIntoView();
        show(hit.entry, hit.op.name);
      } }, hit.text, h("span", { class: "soft" }, ` ${hit.more}`))), ...(found.length ? [] : [h("p", { class: "soft" }, "no module of this name")]));
    },
    onkeydown: (event) => {
      if (event.key === "Escape") hits.hidden = true;
      if (event.key === "Enter") hits.querySelector("button")?.click();
    } });
  return h("div", { class: "tools" }, box, theme(), hits);
}

function theme() {
  return h("button", { onclick: () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    document.dispatchEvent(new Event("theme"));
  } }, "light / dark");
}

function breakdown(plan) {
  const step = plan.numbers.step_time_s, parts = PARTS.filter(([key]) => plan.breakdown_s[key] > 0);
  const bar = h("div", { class: "bar", role: "img", "aria-label": "Parts of the step time" }, parts.map(([key, name, colour]) => h("i", {
    title: `${name} ${seconds(plan.breakdown_s[key])}`, style: { width: `${100 * plan.breakdown_s[key] / step}%`, background: `var(${colour})` } })));
  const legend = h("div", { class: "legend" }, parts.map(([key, name, colour]) => h("span", {}, h("i", { style: { background: `var(${colour})` } }),
    `${name} ${seconds(plan.breakdown_s[key])} (${percent(plan.breakdown_s[key] / step)})`)));
  const drawing = h("div", {}, bar, legend, h("ul", { class: "plain" }, plan.limits.map((text) => h("li", {}, text))));
  return section("breakdown", "Where the step goes, and what limits it", "on the busiest device; communication that hides behind compute is left out",
    drawing, () => table(["part", right("seconds"), right("share")],
      PARTS.map(([key, name]) => [name, plan.breakdown_s[key].toPrecision(5), percent(plan.breakdown_s[key] / step)])));
}

function baselines(plan) {
  const own = { name: "this plan", step_time_s: plan.numbers.step_time_s, summary: plan.stages.map((stage) => stage.mesh).slice(0, 1).join() };
  const all = [own, ...plan.baselines], longest = Math.max(...all.map((b) => b.step_time_s ?? 0));
  const lower = plan.certificate?.lower_bound_s ?? 0;
  const mark = lower > 0 ? { left: `${100 * lower / longest}%` } : null;
  return h("div", {}, all.map((b) => h("div", { class: `baseline${b === own ? " ours" : ""}` }, h("div", {}, b.name),
    h("div", { class: "track", title: b.summary }, h("i", { style: { width: `${100 * (b.step_time_s ?? 0) / longest}%` } }),
      mark ? h("u", { style: mark }) : null),
    h("div", { class: "num" }, b.step_time_s === null ? h("span", { class: "soft" }, b.summary)
      : `${seconds(b.step_time_s)}${b === own ? "" : ` (${(b.step_time_s / own.step_time_s).toFixed(2)}\u00d7)`}`))),
  mark ? h("div", { class: "legend" }, h("span", {}, h("i", { style: { background: "var(--warn)", width: "3px" } }),
    `no plan of the searched space is under ${seconds(lower)}`)) : null);
}

function baselineTable(plan) {
  return table(["plan", right("step"), right("against this plan"), "settings"], plan.baselines.map((b) =>
    [b.name, seconds(b.step_time_s), b.step_time_s ? `${(b.step_time_s / plan.numbers.step_time_s).toFixed(3)}x` : "-", b.summary]));
}

function certificate(plan) {
  const { upper_bound_s: upper, lower_bound_s: lower, order_bound_s: order, gap } = plan.certificate;
  const words = lower > 0
    ? `No plan of the searched space is under ${seconds(lower)} in this model of costs; this one takes ${seconds(upper)}, a gap of ${percent(gap, 2)}.`
    : "No time is proved that no plan can beat.";
  const any = order ? ` In no order of micro-batches do its stages take under ${seconds(order)}.` : "";
  const drawing = h("div", {}, h("p", {}, words, any, plan.certificate.stopped_early ? " The search was stopped early." : ""),
    h("p", { class: "soft" }, `Searched: ${plan.certificate.searched}.`),
    plan.certificate.not_searched.length ? h("details", {}, h("summary", {}, `Not searched: ${plan.certificate.not_searched.length} kinds of plans`),
      h("ul", { class: "plain soft" }, plan.certificate.not_searched.map((text) => h("li", {}, text)))) : null);
  return section("proof", "What is proved", "", drawing, () => table(["", ""], [["upper bound", seconds(upper)], ["lower bound", seconds(lower)],
    ["gap", gap === null ? "-" : percent(gap, 3)], ...(order ? [["these stages in any order", seconds(order)]] : []), ...plan.certificate.not_searched.map((text) => ["not searched", text])]));
}

const data = JSON.parse(document.getElementById("plan-data").textContent);
if (data.sweep) document.getElementById("page").replaceWith(sweep(data, theme()));
else if (data.comparison) document.getElementById("page").replaceWith(comparison(data, theme()));
else build(data);

// The step of every pipeline rank on a canvas: buttons, ctrl and wheel to zoom, drag to move, hover for times, click for a micro-batch.
import { css, h, hideTip, right, showTip, table } from "./dom.js";
import { COMMUNICATION, kindColour, kindName, seconds } from "./format.js";

const LABEL = 92, AXIS = 22, GAP = 7;

export function timeline(data) {
  const { kinds, step_time_s: step, end_s: until = step } = data; // the scale may go beyond the step's own end
  const rows = data.rows.filter((row) => row.drawn !== false);
  const lane = rows.length > 24 ? 11 : 17;
  const height = AXIS + rows.length * (lane + lane / 2 + GAP);
  const canvas = h("canvas", { tabindex: "0", role: "img",
    "aria-label": `Timeline of ${rows.length} pipeline ranks over ${seconds(step)}; press the table button for its numbers` });
  canvas.style.height = `${height}px`;
  let from = 0, to = step, chosen = null;
  const hint = "ctrl + wheel or double click: zoom \u00b7 drag: move \u00b7 click: follow a micro-batch";
  const picked = h("span", { class: "soft" }, hint);
  const buttons = [
    h("button", { "aria-label": "zoom in", onclick: () => zoom(0.5, (from + to) / 2) }, "+"),
    h("button", { "aria-label": "zoom out", onclick: () => zoom(2, (from + to) / 2) }, "\u2212"),
    h("button", { onclick: () => { from = 0; to = step; follow(null); } }, "whole step"),
  ];

  const width = () => canvas.clientWidth || 900;
  const x = (time) => LABEL + (time - from) / (to - from) * (width() - LABEL);
  const timeAt = (px) => from + (px - LABEL) / (width() - LABEL) * (to - from);
  const top = (i) => AXIS + i * (lane + lane / 2 + GAP);

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width() * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const colours = kinds.map((kind) => css(kindColour(kind)));
    const [ink, soft, line, bubble] = ["--ink", "--soft", "--line", "--bubble"].map(css);
    ticks(pen, soft, line);
    rows.forEach((row, i) => {
      pen.fillStyle = bubble;
      pen.fillRect(LABEL, top(i), Math.max(0, Math.min(x(row.end_s ?? until), width()) - LABEL), lane);
      pen.save();
      pen.beginPath();
      pen.rect(LABEL, top(i) - 1, width() - LABEL, lane * 1.5 + 3);
      pen.clip();
      for (const event of row.events) {
        const [kind, , batch, start, end] = event;
        if (end < from || start > to) continue;
        const comm = COMMUNICATION.has(kinds[kind]);
        const left = x(start), wide = Math.max(x(end) - left, 0.4);
        pen.globalAlpha = chosen === null || batch === chosen ? 1 : 0.18;
        pen.fillStyle = colours[kind];
        pen.fillRect(left, comm ? top(i) + lane + 1 : top(i), Math.max(wide - (wide > 3 ? 0.7 : 0), 0.4), comm ? lane / 2 : lane);
        if (!comm && batch >= 0 && wide > 16 && lane > 12) {
          pen.fillStyle = "#fff";
          pen.textAlign = "center";
          pen.fillText(String(batch), left + wide / 2, top(i) + lane / 2 + 0.5);
        }
      }
      pen.restore();
      pen.globalAlpha = 1;
      pen.fillStyle = ink;
      pen.textAlign = "left";
      pen.fillText(row.label ?? `stage ${row.stage}`, 0, top(i) + lane / 2);
      if (lane > 12) {
        pen.fillStyle = soft;
        pen.fillText(row.words ?? `${row.num_devices} device${row.num_devices > 1 ? "s" : ""}`, 0, top(i) + lane * 1.4);
      }
    });
  }

  function ticks(pen, soft, line) {
    const rough = (to - from) / 8, power = 10 ** Math.floor(Math.log10(rough));
    const every = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    pen.fillStyle = soft;
    pen.strokeStyle = line;
    pen.textAlign = "center";
    for (let n = Math.ceil(from / every); n * every <= to; n++) {
      const at = x(n * every);
      pen.beginPath();
      pen.moveTo(at, AXIS - 4);
      pen.lineTo(at, height);
      pen.stroke();
      pen.fillText(seconds(n * every), Math.min(Math.max(at, LABEL + 14), width() - 24), 8);
    }
  }

  function eventAt(event) {
    const box = canvas.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    const i = Math.floor((py - AXIS) / (lane * 1.5 + GAP));
    if (px < LABEL || !rows[i]) return null;
    const below = py - top(i) > lane, time = timeAt(px), slack = (to - from) / width() * 1.5;
    const own = rows[i].events.filter(([kind, , , start, end]) =>
      COMMUNICATION.has(kinds[kind]) === below && start - slack <= time && time <= end + slack);
    return { row: rows[i], event: own.at(-1) ?? null, time };
  }

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, from, to, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const shift = (drag.x - event.clientX) / (width() - LABEL) * (drag.to - drag.from);
      drag.moved ||= Math.abs(drag.x - event.clientX) > 3;
      const bounded = Math.max(-drag.from, Math.min(shift, step - drag.to));
      from = drag.from + bounded;
      to = drag.to + bounded;
      hideTip();
      draw();
      return;
    }
    const at = eventAt(event);
    if (!at) return hideTip();
    if (!at.event) return at.time > (at.row.end_s ?? until) ? hideTip() : showTip(`${at.row.label ?? `stage ${at.row.stage}`} waits at ${seconds(at.time)}`, event);
    const [kind, stage, batch, start, end] = at.event;
    showTip(`${kindName(kinds[kind])}${batch >= 0 ? ` of micro-batch ${batch}` : ""}, stage ${stage}\n`
      + `${seconds(start)} to ${seconds(end)}: ${seconds(end - start)}`, event);
  });
  canvas.addEventListener("pointerup", (event) => {
    const clicked = drag && !drag.moved;
    drag = null;
    if (!clicked) return;
    const batch = eventAt(event)?.event?.[2];
    follow(batch === undefined || batch < 0 || batch === chosen ? null : batch);
  });
  canvas.addEventListener("dblclick", (event) => zoom(0.25, timeAt(event.clientX - canvas.getBoundingClientRect().left)));
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;  // a plain wheel scrolls the page
    event.preventDefault();
    zoom(Math.exp(event.deltaY * 0.0016), timeAt(event.clientX - canvas.getBoundingClientRect().left));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const wide = to - from;
    if (event.key === "+" || event.key === "=") zoom(0.7, (from + to) / 2);
    else if (event.key === "-") zoom(1.4, (from + to) / 2);
    else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const shift = Math.max(-from, Math.min((event.key === "ArrowRight" ? 0.2 : -0.2) * wide, step - to));
      from += shift;
      to += shift;
      draw();
    } else return;
    event.preventDefault();
  });

  function follow(batch) {
    chosen = batch;
    picked.textContent = batch === null ? hint : `micro-batch ${batch}: ${journey(rows, kinds, batch)}`;
    draw();
  }

  function zoom(factor, about) {
    const centre = Math.max(0, Math.min(about, step));
    const wide = Math.min(step, Math.max(step * 1e-5, (to - from) * factor));
    const share = (centre - from) / (to - from);
    from = Math.max(0, Math.min(centre - share * wide, step - wide));
    to = from + wide;
    draw();
  }

  const names = new Map();  // of one colour, together
  for (const kind of kinds) names.set(kindColour(kind), [...new Set([...(names.get(kindColour(kind)) ?? []), kindName(kind)])]);
  const legend = h("div", { class: "legend" }, [...names].map(([colour, own]) =>
    h("span", {}, h("i", { style: { background: `var(${colour})` } }), own.join(", "))),
  h("span", {}, h("i", { style: { background: "var(--bubble)" } }), "bubble"));
  new ResizeObserver(draw).observe(canvas);
  document.addEventListener("theme", draw);
  return h("div", { class: "canvas" }, h("div", { class: "head" }, h("div", { class: "zoom" }, buttons), picked), canvas, legend);
}

function journey(rows, kinds, batch) {
  const own = rows.flatMap((row) => row.events.filter((event) => event[2] === batch && !COMMUNICATION.has(kinds[event[0]])));
  const first = Math.min(...own.map((event) => event[3])), last = Math.max(...own.map((event) => event[4]));
  const busy = own.reduce((sum, event) => sum + event[4] - event[3], 0);
  return `enters at ${seconds(first)}, leaves at ${seconds(last)}; computed for ${seconds(busy)} of that on all stages`;
}

const MOST_ROWS = 3000;

export function timelineTable({ rows, kinds }) {
  const all = rows.flatMap((row) => row.events.map(([kind, stage, batch, start, end]) =>
    [row.stage, stage, kindName(kinds[kind]), batch < 0 ? "" : batch, seconds(start), seconds(end), seconds(end - start)]));
  const columns = ["pipeline rank", "stage", "what", right("micro-batch"), right("start"), right("end"), right("takes")];
  const more = all.length > MOST_ROWS
    ? h("p", { class: "soft" }, `the first ${MOST_ROWS} of ${all.length} events; autopar simulate --trace writes them all`) : null;
  return h("div", {}, more, table(columns, all.slice(0, MOST_ROWS)));
}

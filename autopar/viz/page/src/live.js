// A run beside its prediction: measured rows under predicted ones on one scale, and the differences in a table.
import { h, right, section, table } from "./dom.js";
import { digits, seconds } from "./format.js";
import { timeline, timelineTable } from "./timeline.js";

export function live(data) {
  const { predicted_s: predicted, measured_s: measured } = data;
  const ratio = measured / predicted, many = data.step_times_s.length;
  const words = `${data.name} on ${data.device}: step ${data.step + 1} of ${many} recorded took ${seconds(measured)}, predicted ${seconds(predicted)}`
    + ` (${digits(ratio, 3)}\u00d7)`;
  const all = many > 1 ? `; the steps took ${data.step_times_s.map((time) => seconds(time)).slice(0, 8).join(", ")}${many > 8 ? " \u2026" : ""}` : "";
  const differences = table(["stage", "", right("predicted"), right("measured"), right("measured / predicted")], data.table.map((row) => [
    row.stage ?? "", row.what, seconds(row.predicted_s), seconds(row.measured_s),
    row.predicted_s && row.measured_s ? `${(row.measured_s / row.predicted_s).toFixed(2)}\u00d7` : "-"]));
  return section("live", "The run beside the prediction", "under each predicted row, what the device of it that worked longest did",
    h("div", {}, h("p", {}, words + all), timeline(data.timeline), h("h3", {}, "differences"), differences,
      h("ul", { class: "plain soft" }, data.notes.map((note) => h("li", {}, note)))), () => timelineTable(data.timeline));
}

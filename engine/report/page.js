"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const switches = document.getElementById("switches");
const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;"); // plotly reads tags in its texts

/** One line for each run, a stronger one through its medians where it was thinned, and above and below it where runs stopped and updates were skipped. */
function traces(plot, x) {
  const several = data.runs.length > 1;
  return data.runs.flatMap((run, place) => {
    const series = run.series[plot.name];
    if (!series) return [];
    const ink = colour(`--c${place % 8}`);
    const median = run.series[`median ${plot.name}`];
    const line = {
      x: series[x], y: series.y, name: plain(run.name), mode: series.y.length > 60 ? "lines" : "lines+markers",
      opacity: median ? 0.4 : 1, line: {color: ink, width: median ? 1 : 1.5, shape: plot.steps ? "vh" : "linear"}, marker: {size: 5},
      hovertemplate: several ? "%{y:.5~g} %{fullData.name}<extra></extra>" : "%{y:.5~g}<extra></extra>",
    };
    const marks = run.marks.filter(mark => mark.text.length).map(mark => ({
      x: mark[x], y: mark.text.map(() => mark.kind === "stop" ? 0.97 : 0.03), yaxis: "y2", mode: "markers",
      text: mark.text.map(plain), hovertemplate: "%{text}<extra></extra>",
      marker: {color: colour("--alarm"), size: 8, symbol: mark.kind === "stop" ? "triangle-down" : "x"},
    }));
    const middle = median ? [{x: median[x], y: median.y, mode: "lines", line: {color: ink, width: 2}, hoverinfo: "skip"}] : [];
    const beside = (plot.beside || []).filter(name => run.series[name]).map(name => ({
      x: run.series[name][x], y: run.series[name].y, mode: "lines", opacity: 0.6, hovertemplate: `%{y:.5~g} ${name}<extra></extra>`,
      line: {color: ink, width: 1, dash: name === "weight" ? "dot" : "solid"},
    }));
    return [line, ...middle, ...beside, ...marks];
  });
}

function layout(plot, x, isLog) {
  const all = data.runs.filter(run => run.series[plot.name]).flatMap(run => run.series[plot.name].y);
  const ends = [Math.min(...all.filter(y => y !== null)), Math.max(...all.filter(y => y !== null))];
  const isFlat = ends[0] === ends[1] && ends[0] !== 0; // plotly would show it from 1 below to 1 above, so that 0.003 looks like 0
  const isLarge = all.some(y => Math.abs(y) >= 1e4), isSmall = all.every(y => Math.abs(y) <= 6);
  const axis = {gridcolor: colour("--grid"), zeroline: false, automargin: true};
  return {
    margin: {l: 48, r: 12, t: 8, b: 36}, showlegend: false, hovermode: "x unified",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // or a finger could not scroll the page
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: colour("--card"),
    font: {color: colour("--text"), family: "system-ui, sans-serif", size: 12},
    hoverlabel: {bgcolor: colour("--ground"), bordercolor: colour("--grid"), font: {color: colour("--text")}},
    xaxis: {
      ...axis, range: [0, data.end[x]], tickformat: "~s", title: {text: x === "update" ? "updates" : "samples", standoff: 8},
      spikecolor: colour("--quiet"), spikethickness: 1, spikedash: "dot",
      unifiedhovertitle: {text: x === "update" ? "update %{x:,d}" : "after %{x:,d} samples"},
    },
    yaxis: {
      ...axis, type: isLog ? "log" : "linear", tickformat: isLarge ? "~s" : ".4~g", nticks: 6,
      ...(isFlat && !isLog ? {range: [Math.min(0, 2 * ends[0]), Math.max(0, 2 * ends[0])]} : {}),
      ...(plot.steps && !isLog ? {rangemode: "tozero", ...(isSmall ? {dtick: 1} : {})} : {}),
    },
    yaxis2: {overlaying: "y", range: [0, 1], visible: false, fixedrange: true},
  };
}

function draw() {
  const x = switches.elements.x.value;
  for (const plot of data.plots) {
    const there = document.getElementById(`plot ${plot.name}`);
    const isLog = switches.elements.log.checked;
    Plotly.react(there, traces(plot, x), layout(plot, x, isLog), {displayModeBar: false, responsive: true});
  }
}

if (switches) {
  for (const plot of data.plots) {
    const figure = document.getElementById("plots").appendChild(document.createElement("figure"));
    figure.appendChild(document.createElement("figcaption")).textContent = plot.title;
    const there = figure.appendChild(document.createElement("div"));
    there.id = `plot ${plot.name}`;
    there.className = "plot";
  }
  switches.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  draw();
}

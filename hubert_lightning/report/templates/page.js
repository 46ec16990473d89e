"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = read("charts"), clips = read("clips");
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)"), coarse = matchMedia("(pointer: coarse)");
  const drawn = new Set();
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Colours of text, grid and background follow the page, in light, dark and print
  const themed = (layout) => {
    const text = css("--muted"), grid = css("--grid");
    const result = {
      ...layout, autosize: true, showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: layout.margin || { l: 58, r: 14, t: 10, b: 44 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: text },
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--text"), size: 12 }, namelength: 40 },
      dragmode: coarse.matches ? false : "zoom",
    };
    for (const name of ["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis\d+$/.test(key))]) {
      const axis = layout[name] || {};
      result[name] = {
        gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickcolor: grid, automargin: true, ...axis,
        title: axis.title ? { standoff: 8, ...axis.title, font: { size: 12, color: text } } : undefined,
      };
    }
    return result;
  };
  const coloured = (traces) => traces.map((trace) => trace.meta === "sequential"
    ? { ...trace, colorscale: [[0, css("--low")], [1, css("--high")]],
        colorbar: trace.colorbar ? { ...trace.colorbar, tickfont: { color: css("--muted") } } : undefined }
    : trace.mode === "text" ? { ...trace, textfont: { ...trace.textfont, color: css("--text") } } : trace);
  const config = { responsive: true, displaylogo: false, displayModeBar: coarse.matches ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], doubleClick: "reset" };

  // plotly.js is large, so it starts after the text of the page is shown
  const startPlotly = () => {
    if (window.Plotly) return;
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  };
  const draw = (element) => {
    startPlotly();
    const { figure } = charts[Number(element.dataset.chart)];
    drawn.add(element);
    return Plotly.react(element, coloured(structuredClone(figure.data)), themed(structuredClone(figure.layout)), config);
  };
  const start = (audio) => {
    if (!audio.src) audio.src = clips[audio.dataset.clip];
  };

  // Charts and players come to life when they are about to be seen, so that a long page opens at once
  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      if (target.matches("audio")) start(target);
      else draw(target);
    }
  }, { rootMargin: "600px 0px" });
  document.querySelectorAll("audio").forEach((element) => observer.observe(element));
  addEventListener("load", () => setTimeout(() => {
    document.querySelectorAll(".plot").forEach((element) => observer.observe(element));
  }, 50));
  const redraw = () => drawn.forEach(draw);
  dark.addEventListener("change", redraw);

  // A line moves over the spectrogram while its recording plays
  document.querySelectorAll(".watched").forEach((part) => {
    const audio = part.querySelector("audio"), plot = part.querySelector(".plot");
    if (!audio || !plot) return;
    const head = plot.parentNode.appendChild(document.createElement("div"));
    head.className = "head";
    plot.parentNode.style.position = "relative";
    const margin = charts[Number(plot.dataset.chart)].figure.layout.margin;
    const move = () => {
      const range = plot.layout && plot.layout.xaxis.range;
      if (!range) return;
      const share = (audio.currentTime - range[0]) / (range[1] - range[0]);
      head.style.display = share >= 0 && share <= 1 ? "block" : "none";
      head.style.left = `${margin.l + share * (plot.clientWidth - margin.l - margin.r)}px`;
      head.style.height = `${plot.clientHeight - margin.t - margin.b}px`;
      if (!audio.paused && !audio.ended) requestAnimationFrame(move);
    };
    ["play", "seeked", "pause"].forEach((name) => audio.addEventListener(name, move));
    plot.addEventListener("dblclick", (event) => event.preventDefault());
  });
  document.addEventListener("play", (event) => {
    document.querySelectorAll("audio").forEach((other) => other !== event.target && other.pause());
  }, true);

  // On paper, everything is open and drawn, in light colours and as wide as the sheet
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => { details.open = true; });
    root.classList.add("printing");
    document.querySelectorAll(".plot").forEach((element) => { draw(element); Plotly.Plots.resize(element); });
  });
  addEventListener("afterprint", () => {
    closed.forEach((details) => { details.open = false; });
    root.classList.remove("printing");
    redraw();
    drawn.forEach((element) => Plotly.Plots.resize(element));
  });
})();

// Draws the charts that the server describes (proxy/ui/charts.py). Nothing in a description is interpreted as HTML.
(() => {
  "use strict";
  // Okabe and Ito's palette, in an order that keeps neighbours apart. Shapes repeat what colours say.
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#a5558a", "#8f6a00", "#3b8fc4", "#4d4d4d"];
  const DARK = ["#56b4e9", "#e69f00", "#2bbf95", "#cc79a7", "#f0e442", "#f08040", "#bdbdbd"];
  const SYMBOLS = ["circle", "rect", "triangle", "diamond", "roundRect", "pin", "arrow"];
  const STEPS = 20; // of the line between two points
  const BESIDE = "beside"; // begins the ids of series that have no points of their own
  const number = new Intl.NumberFormat(undefined, { maximumSignificantDigits: 4 });
  const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumSignificantDigits: 3 });
  const time = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const drawn = new Map();

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    return {
      series: window.autotts.isDark() ? DARK : LIGHT,
      text: value("--text"), muted: value("--muted"), line: value("--line"), surface: value("--surface"),
    };
  };
  const titled = (axis) => (axis.unit ? `${axis.label} (${axis.unit})` : axis.label);
  const xValue = (axis, x) => (axis.scale === "time" ? x * 1000 : x);
  const xText = (axis, x) => {
    if (axis.scale === "time") return time.format(new Date(x));
    return typeof x === "number" ? `${number.format(x)} ${axis.unit}`.trim() : String(x);
  };

  const axisOption = (axis, palette, isX, narrow) => ({
    type: axis.scale,
    name: titled(axis),
    nameLocation: "middle",
    nameGap: isX ? 30 : narrow ? 40 : 52,
    nameTextStyle: { color: palette.muted },
    min: axis.minimum ?? (axis.scale === "log" ? "dataMin" : null),
    max: axis.maximum ?? (axis.scale === "log" ? "dataMax" : null),
    scale: axis.scale === "value" && axis.minimum !== 0,
    minInterval: axis.is_count ? 1 : undefined,
    axisLine: { lineStyle: { color: palette.line } },
    axisLabel: {
      color: palette.muted,
      hideOverlap: true,
      ...(axis.scale === "value" || axis.scale === "log" ? { formatter: (value) => short.format(value) } : {}),
    },
    splitLine: { show: !isX, lineStyle: { color: palette.line } },
    minorSplitLine: { show: false },
  });

  // On a logarithmic axis, neighbours are joined by lines that are straight in x, as AFS counts them: a random mix of
  // the two reaches what is between them. Rows are x and the figures at it.
  const joined = (chart, rows) => {
    if (chart.kind !== "line" || chart.x.scale !== "log") return rows;
    return rows.flatMap((row, at) => {
      const next = rows[at + 1];
      if (!next || [...row, ...next].includes(null)) return [row];
      return Array.from({ length: STEPS }, (_, step) => {
        const x = row[0] * (next[0] / row[0]) ** (step / STEPS);
        const share = next[0] === row[0] ? step / STEPS : (x - row[0]) / (next[0] - row[0]);
        return row.map((value, column) => (column === 0 ? x : value + share * (next[column] - value)));
      });
    });
  };

  const seriesOptions = (chart, palette) => {
    const options = [];
    chart.series.forEach((series, index) => {
      const colour = series.is_reference ? palette.muted : palette.series[index % palette.series.length];
      const data = series.points.map(([x, y]) => [xValue(chart.x, x), y]);
      const isStacked = chart.kind === "area" || chart.kind === "bar";
      const line = joined(chart, data);
      const style = { width: 2, type: series.is_reference ? "dashed" : "solid" };
      // What shares the name is shown and hidden together; the legend takes its colour from the first.
      const beside = { name: series.name, type: "line", symbol: "none", silent: true, color: colour };
      options.push({
        name: series.name,
        type: chart.kind === "bar" ? "bar" : "line",
        data,
        stack: isStacked ? "all" : undefined,
        areaStyle: chart.kind === "area" ? { opacity: 0.55 } : undefined,
        barMaxWidth: 48,
        color: colour,
        symbol: SYMBOLS[index % SYMBOLS.length],
        symbolSize: chart.kind === "area" ? 5 : 8,
        showSymbol: chart.kind !== "area",
        lineStyle: line === data ? style : { opacity: 0 },
        connectNulls: false,
        emphasis: { focus: "none" },
        z: 3,
      });
      if (line !== data) options.push({ ...beside, id: `${BESIDE} line ${index}`, data: line, lineStyle: style });
      if (series.low.length) {
        const ends = data.map(([x], at) => [x, series.low[at], series.high[at] - series.low[at]]);
        const rows = joined(chart, ends);
        const band = { ...beside, stack: `band ${index}`, lineStyle: { opacity: 0 }, stackStrategy: "all" };
        options.push({ ...band, id: `${BESIDE} low ${index}`, data: rows.map(([x, low]) => [x, low]) });
        options.push({
          ...band, id: `${BESIDE} band ${index}`, data: rows.map(([x, , width]) => [x, width]),
          areaStyle: { color: colour, opacity: 0.18 },
        });
      }
    });
    return options;
  };

  const tooltip = (chart) => (items) => {
    const list = (Array.isArray(items) ? items : [items]).filter((item) => !item.seriesId.startsWith(BESIDE));
    if (!list.length) return "";
    const lines = [xText(chart.x, list[0].value[0])];
    for (const item of list) {
      const series = chart.series.find((candidate) => candidate.name === item.seriesName);
      if (!series || item.value[1] === null) continue;
      const at = item.dataIndex;
      const band = series.low.length ? ` (${number.format(series.low[at])} to ${number.format(series.high[at])})` : "";
      lines.push(`${item.seriesName}: ${number.format(item.value[1])} ${chart.y.unit}${band}`.trim());
      if (series.notes.length && series.notes[at]) lines.push(series.notes[at]);
    }
    return lines.join("\n");
  };

  const draw = (element) => {
    const chart = JSON.parse(element.dataset.chart);
    const palette = colours();
    const narrow = element.clientWidth < 500;
    const instance = echarts.getInstanceByDom(element) || echarts.init(element, null, { renderer: "canvas" });
    const hasLegend = chart.series.length > 1 || chart.series[0].name !== chart.y.label.toLowerCase();
    const isByAxis = !chart.series.some((series) => series.notes.length);
    instance.setOption({
      animation: false,
      textStyle: { fontFamily: getComputedStyle(document.body).fontFamily },
      grid: { left: narrow ? 58 : 74, right: 18, top: 16, bottom: hasLegend ? 82 : 48 },
      legend: {
        show: hasLegend, type: "scroll", bottom: 0, itemWidth: 16, itemHeight: 10,
        textStyle: { color: palette.text }, pageTextStyle: { color: palette.muted },
        pageIconColor: palette.text, pageIconInactiveColor: palette.line,
        data: chart.series.map((series) => series.name),
      },
      tooltip: {
        trigger: isByAxis ? "axis" : "item", renderMode: "richText", confine: true, formatter: tooltip(chart),
        backgroundColor: palette.surface, borderColor: palette.line, textStyle: { color: palette.text },
      },
      xAxis: axisOption(chart.x, palette, true, narrow),
      yAxis: axisOption(chart.y, palette, false, narrow),
      series: seriesOptions(chart, palette),
    }, { notMerge: true });
    instance.off("click");
    instance.on("click", (item) => {
      const series = chart.series.find((candidate) => candidate.name === item.seriesName);
      const value = series && series.values[item.dataIndex];
      if (value) element.dispatchEvent(new CustomEvent("autotts:point", { bubbles: true, detail: { value } }));
    });
    drawn.set(element, instance);
  };

  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) drawn.get(target)?.resize();
  });
  const drawAll = (element) => {
    for (const [old, instance] of drawn) {
      if (old.isConnected) continue;
      instance.dispose();
      resized.unobserve(old);
      drawn.delete(old);
    }
    for (const chart of element.querySelectorAll("[data-chart]")) {
      if (drawn.has(chart)) continue;
      draw(chart);
      resized.observe(chart);
    }
  };
  document.addEventListener("autotts:theme", () => [...drawn.keys()].forEach(draw));
  document.addEventListener("htmx:load", () => drawAll(document));
  document.addEventListener("DOMContentLoaded", () => drawAll(document));
})();

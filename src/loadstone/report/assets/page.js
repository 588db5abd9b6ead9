"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const FONT = "12px system-ui, sans-serif";
  const MARK_ROW = 16;
  // The same room above every plot, so that neighbours stand level.
  const MARK_ROWS = Math.max(...charts.map((chart) => chart.marks.length));

  const text = (v) => v >= 100 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(3));

  // One common x for uPlot: each curve is null where it has no point of its own.
  function columns(chart) {
    const xs = [...new Set(chart.curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    const column = (curve) => {
      const at = new Map(curve.x.map((x, i) => [x, curve.y[i]]));
      return xs.map((x) => at.get(x) ?? null);
    };
    return [xs, ...chart.curves.map(column)];
  }

  // The legend reads each curve at its own nearest point, not at the common x.
  function nearest(u, series, index) {
    const values = u.data[series];
    for (let d = 0; d < values.length; d++) {
      if (values[index - d] != null) return index - d;
      if (values[index + d] != null) return index + d;
    }
    return index;
  }

  function axis(spec, size, label) {
    return {
      scale: label ? "y" : "x",
      stroke: tone("soft"), font: FONT, size,
      label: label || "concurrent requests, log scale", labelFont: FONT, labelSize: 18, labelGap: 0,
      grid: { stroke: tone("grid"), width: 1 }, ticks: { stroke: tone("grid"), width: 1, size: 5 },
      splits: () => spec.ticks,
      filter: (u, splits) => sparse(u, splits, label ? "y" : "x"),
      values: (u, splits) => splits.map((v) => v == null ? "" : text(v)),
    };
  }

  // Ticks whose labels would touch lose their label (and their grid line).
  function sparse(u, splits, scale) {
    let last = -Infinity;
    return splits.map((v) => {
      const at = u.valToPos(v, scale);
      const room = scale === "x" ? 7 * text(v).length + 8 : 18;
      if (Math.abs(at - last) < room) return null;
      last = at;
      return v;
    });
  }

  const px = () => uPlot.pxRatio;

  function inside(u, paint) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    paint(ctx, bbox);
    ctx.restore();
  }

  function behind(u, chart) {
    inside(u, (ctx, bbox) => {
      for (const mark of chart.marks) {
        if (mark.low == null || mark.low >= mark.high) continue;
        const left = u.valToPos(mark.low, "x", true);
        ctx.globalAlpha = 0.15;
        ctx.fillStyle = tone(mark.tone);
        ctx.fillRect(left, bbox.top, u.valToPos(mark.high, "x", true) - left, bbox.height);
      }
      for (const curve of chart.curves) band(u, ctx, curve);
    });
    chart.marks.forEach((mark, row) => vertical(u, mark, row));
    chart.marks.forEach((mark, row) => label(u, mark, row));
    if (chart.limit) horizontal(u, chart.limit);
  }

  function band(u, ctx, curve) {
    const known = curve.x.map((x, i) => [x, curve.low[i], curve.high[i]])
      .filter(([, low, high]) => low != null && high != null)
      .map(([x, low, high]) => [u.valToPos(x, "x", true), u.valToPos(low, "y", true), u.valToPos(high, "y", true)]);
    if (!known.length) return;
    ctx.fillStyle = ctx.strokeStyle = tone(curve.tone);
    ctx.globalAlpha = 0.18;
    ctx.beginPath();
    known.forEach(([x, low]) => ctx.lineTo(x, low));
    known.slice().reverse().forEach(([x, , high]) => ctx.lineTo(x, high));
    ctx.fill();
    ctx.globalAlpha = 1;
    ctx.lineWidth = 1.5 * px();
    ctx.beginPath();
    for (const [x, low, high] of known) { ctx.moveTo(x, low); ctx.lineTo(x, high); }
    ctx.stroke();
  }

  // A halo in the colour of the panel keeps a text legible where a line runs through it.
  function write(ctx, words, x, y, align) {
    ctx.font = `${12 * px()}px system-ui, sans-serif`;
    ctx.textAlign = align;
    ctx.textBaseline = "middle";
    ctx.setLineDash([]);
    ctx.lineWidth = 4 * px();
    ctx.lineJoin = "round";
    ctx.strokeStyle = tone("panel");
    ctx.strokeText(words, x, y);
    ctx.fillText(words, x, y);
  }

  // One row for each label above the plot: lines close together cannot write over each other.
  const markX = (u, mark) => Math.round(u.valToPos(mark.at, "x", true));
  const markY = (u, row) => u.bbox.top - (row + 0.5) * MARK_ROW * px();

  function vertical(u, mark, row) {
    const { ctx, bbox } = u;
    const x = markX(u, mark);
    ctx.save();
    ctx.strokeStyle = tone(mark.tone);
    ctx.lineWidth = 1.5 * px();
    ctx.setLineDash(mark.tone === "line" ? [] : [6 * px(), 4 * px()]);
    ctx.beginPath();
    ctx.moveTo(x, markY(u, row) - 6 * px());
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.restore();
  }

  function label(u, mark, row) {
    const { ctx, bbox } = u;
    const left = markX(u, mark) > bbox.left + bbox.width / 2;
    const x = markX(u, mark) + (left ? -5 : 5) * px();
    ctx.save();
    ctx.fillStyle = tone(mark.tone);
    write(ctx, `${mark.label} ${text(Math.round(mark.at))}`, x, markY(u, row), left ? "right" : "left");
    ctx.restore();
  }

  function horizontal(u, limit) {
    const { ctx, bbox } = u;
    const y = Math.round(u.valToPos(limit.value, "y", true));
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = tone("limit");
    ctx.lineWidth = 1.5 * px();
    ctx.setLineDash([8 * px(), 4 * px()]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    const above = y - bbox.top > 22 * px();
    write(ctx, limit.label, bbox.left + 6 * px(), y + (above ? -10 : 10) * px(), "left");
    ctx.restore();
  }

  const SHAPES = {
    PASS: (ctx, x, y, r) => ctx.arc(x, y, r, 0, 2 * Math.PI),
    UNRESOLVED: (ctx, x, y, r) => { ctx.moveTo(x, y - r); ctx.lineTo(x + r, y); ctx.lineTo(x, y + r); ctx.lineTo(x - r, y); ctx.closePath(); },
    FAIL: (ctx, x, y, r) => { ctx.moveTo(x - r, y - r); ctx.lineTo(x + r, y + r); ctx.moveTo(x + r, y - r); ctx.lineTo(x - r, y + r); },
  };

  function inFront(u, chart) {
    const { ctx } = u;
    ctx.save();
    ctx.lineWidth = 2.5 * px();
    for (const curve of chart.curves) {
      curve.verdicts.forEach((verdict, i) => {
        if (curve.y[i] == null) return;
        ctx.fillStyle = ctx.strokeStyle = tone(verdict.toLowerCase());
        ctx.beginPath();
        SHAPES[verdict](ctx, u.valToPos(curve.x[i], "x", true), u.valToPos(curve.y[i], "y", true), 5 * px());
        if (verdict === "FAIL") ctx.stroke(); else ctx.fill();
      });
    }
    ctx.restore();
  }

  const range = (spec) => () => [spec.low, spec.high];
  const scale = (spec) => ({ time: false, distr: spec.log ? 3 : 1, range: range(spec) });

  function options(chart, width) {
    return {
      width, height: 360, padding: [MARK_ROW * MARK_ROWS + 10, 14, 0, 0],
      scales: { x: scale(chart.x), y: scale(chart.y) },
      axes: [axis(chart.x, 28), axis(chart.y, 48, chart.unit + (chart.y.log ? ", log scale" : ""))],
      series: [
        { label: "N", value: (u, v) => v == null ? "" : text(v) },
        ...chart.curves.map((curve) => ({
          label: curve.label, stroke: tone(curve.tone), width: 2, spanGaps: true,
          dash: curve.smooth ? [6, 5] : undefined,
          points: { show: !curve.smooth && !curve.verdicts.length, size: 5, fill: tone(curve.tone) },
          value: (u, v) => v == null ? "" : text(v),
        })),
      ],
      cursor: { y: false, drag: { x: false, y: false }, dataIdx: nearest },
      legend: { markers: { width: 0, fill: (u, i) => tone(chart.curves[i - 1].tone) } },
      hooks: { drawAxes: [(u) => behind(u, chart)], draw: [(u) => inFront(u, chart)] },
    };
  }

  const drawn = new Map();
  const widths = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) drawn.get(target)?.setSize({ width: Math.floor(contentRect.width), height: 360 });
  });

  function drawAll() {
    for (const chart of charts) {
      const box = document.getElementById(`chart-${chart.key}`);
      drawn.get(box)?.destroy();
      drawn.set(box, new uPlot(options(chart, box.clientWidth), columns(chart), box));
      widths.observe(box);
    }
  }

  drawAll();
  dark.addEventListener("change", drawAll);
})();

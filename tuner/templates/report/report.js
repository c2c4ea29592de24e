// Draws the charts in the page's colours, and again when it turns dark or light.
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = (layout) => {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
    const narrow = window.innerWidth <= 600;
    return {
      ...layout,
      showlegend: layout.showlegend !== false && !narrow, // narrow pages have one legend above all charts
      legend: { ...layout.legend, itemwidth: 30, font: { size: narrow ? 10 : 12 } },
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: narrow ? 10 : 12 },
      hoverlabel: { align: "left", bgcolor: colour("--card"), bordercolor: colour("--soft"), font: { color: colour("--ink") } },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
  };
  const options = { responsive: true, displayModeBar: false };
  const draw = () => {
    const drawn = Object.entries(specs).map(([id, spec]) => Plotly.react(id, spec.data, themed(spec.layout), options));
    return Promise.all(drawn).then(() => { document.documentElement.dataset.drawn = "true"; });
  };
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();

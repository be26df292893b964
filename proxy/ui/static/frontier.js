// Frontier: show what selects a point that was clicked in a chart or chosen in the list.
(() => {
  "use strict";
  const show = (value) => {
    const [controller, beta] = value.split("\n");
    document.getElementById("header").textContent = `${beta}\n\n${JSON.stringify({ tts: { controller } })}`;
  };
  document.addEventListener("DOMContentLoaded", () => {
    const list = document.getElementById("point");
    if (!list) return;
    list.addEventListener("change", () => show(list.value));
    document.addEventListener("autotts:point", (event) => {
      list.value = event.detail.value;
      show(event.detail.value);
      document.getElementById("use-title").scrollIntoView({ block: "nearest" });
    });
  });
})();

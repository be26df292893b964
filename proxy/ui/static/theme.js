// Applies the viewer's choice of light or dark before the page is drawn. Without one, the system's setting counts.
(() => {
  "use strict";
  const chosen = localStorage.getItem("autotts-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();

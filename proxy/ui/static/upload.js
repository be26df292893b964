// Upload of a file of recordings: the file is the body of the request, so that the server can stream it.
(() => {
  "use strict";
  document.addEventListener("DOMContentLoaded", () => {
    const form = document.getElementById("upload");
    if (!form) return;
    const status = document.getElementById("upload-status");
    const button = form.querySelector("button");
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      button.disabled = true;
      status.className = "muted";
      status.textContent = "Importing …";
      try {
        const response = await fetch(form.dataset.to, {
          method: "POST",
          body: form.elements.file.files[0],
          headers: { "content-type": "application/x-ndjson", "x-csrf-token": window.autotts.csrf() },
        });
        const result = await response.json();
        if (response.ok) {
          status.textContent = `${result.recordings} recordings of ${result.questions} new questions, ${result.branches} branches added; ${result.known} recordings were already there. Reload the page to see them.`;
        } else {
          status.className = "problem";
          status.textContent = result.error.message;
        }
      } catch {
        status.className = "problem";
        status.textContent = "The file was not sent completely: it is too large, or the connection was lost. Try again.";
      } finally {
        button.disabled = false;
      }
    });
  });
})();

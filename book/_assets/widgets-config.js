// Tells require.js where the vendored widget files lie: in vendor/ beside this file, at any page depth and for file://.
(function () {
  "use strict";
  var vendor = new URL("vendor/", document.currentScript.src).href;
  window.requirejs.config({ baseUrl: vendor, waitSeconds: 30, paths: { anywidget: vendor + "anywidget" } });

  // html-manager still calls the Hub of MathJax 2; Sphinx loads MathJax 3.
  window.addEventListener("load", function () {
    var mathjax = window.MathJax;
    if (mathjax && !mathjax.Hub) {
      mathjax.Hub = {
        Queue: function (call) {
          if (call && call[0] === "Typeset" && mathjax.typesetPromise) {
            mathjax.typesetPromise([call[2]]).catch(console.warn);
          }
        },
      };
    }
  });
})();

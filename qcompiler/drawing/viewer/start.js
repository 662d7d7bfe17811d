// All parts are there: the first picture.
"use strict";

showTheme();
legend();
refit();
document.body.dataset.ready = "true";

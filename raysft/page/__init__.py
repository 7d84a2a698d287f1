"""report.html: a run, a sweep, or several runs beside each other, on one page that needs nothing
else. `facts` reads what there is to show, `build` puts it into the page."""

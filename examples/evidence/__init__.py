"""The papers' tables on the lab's experts: what is measured, how, and the page that shows it."""

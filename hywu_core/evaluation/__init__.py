"""Evaluation: benchmark items, editors, judges, WU-Eval, GEdit-Bench, ImgEdit-Bench, GSB, reports."""

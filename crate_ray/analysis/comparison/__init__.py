"""The comparison of CRATE-MAE with MAE: rows of runs to gates, paired differences, fronts, verdicts and a report."""

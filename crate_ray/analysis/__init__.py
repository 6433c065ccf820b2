"""Analysis: statistics over seeds, comparisons, the findings of sweeps, figures and reports. Neither ray nor mlflow."""

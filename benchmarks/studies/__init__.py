"""What the studies share: records, statistics, tables, figures, the loop of runs."""

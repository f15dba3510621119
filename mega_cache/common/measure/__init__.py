"""What runs took and gave: trials, measures, tables and result files."""

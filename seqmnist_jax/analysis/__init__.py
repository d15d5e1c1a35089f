"""What is made of runs that are there: a trained model, its scores, comparisons, tables, exports, the report.

Reads work directories and gives JSON values; nothing here trains. Above `training`, below `cli`.
"""

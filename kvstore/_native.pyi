# --- hash
# --- copy
# --- quant
# --- io
# --- policy
# --- core

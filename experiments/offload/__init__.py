"""What experts on disk would cost: along a trace (`simulate`), foretold (`predict`), in fewer bits (`widths`)."""

"""Methods that need input statistics: calibration data through the model, or a file of statistics, to the layers."""

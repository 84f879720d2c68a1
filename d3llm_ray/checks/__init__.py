"""What the paper claims of decoding, or leaves open, asked again: a job, a report and a verdict each."""

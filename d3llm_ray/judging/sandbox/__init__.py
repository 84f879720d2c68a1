"""Programs that others have written, run where they can harm nothing."""

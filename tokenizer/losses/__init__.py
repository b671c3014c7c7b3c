"""The training objective of stage one."""

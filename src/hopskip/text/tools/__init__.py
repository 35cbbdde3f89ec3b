"""Tool calls in the formats that models write them in.

`base` has the contract: a `ToolFormat` says how calls begin, has a grammar of them, writes one, and makes the bodies
that read them as they come. `formats` knows all formats, `reader` reads an answer, `prompt` tells a model of its tools
whose template does not.
"""

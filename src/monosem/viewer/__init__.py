"""RUN -> pages in the browser: what was trained, how good it is, and what each latent fires on, votes for and does.

    reading    a run folder as the pages read it       search     the table of latents: sort, filter, full text
    notes      people's own words and stars            text       how tokens and numbers are shown
    web        addresses, templates, guards            server     the pages and the API put together
    overview, latents, latent, scaling                 a page each: `view` gathers its data, ENDPOINTS are its addresses

Every page is whole in its HTML; the JavaScript in static/ adds charts, tabs and keys. docs/viewer.md says how to add a
page. Nothing here imports torch.
"""

-- The body and the header of the embedding guide's request, for wrk.
local file = assert(io.open(os.getenv("REQUEST") or "test_request.json"))
wrk.method = "POST"
wrk.body = file:read("*a")
wrk.headers["Content-Type"] = "application/json"
file:close()

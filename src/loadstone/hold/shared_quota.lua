-- The quotas of one client, shared by several gates; every verb is one atomic step, by Redis's own clock.
--
-- KEYS  minute, hour: sorted sets, id of a reservation -> microsecond it was taken at
--       tokens: hash, id -> its tokens while they count in the minute; "sum" -> all of them
-- ARGV  verb, id, tokens, requests per minute, requests per hour, tokens per minute (0: no bound)
-- Gives {1, now}, {0, microseconds to wait, which bound} or, for standings, {used, microseconds to reset, ...}

local minute, hour, tokens = KEYS[1], KEYS[2], KEYS[3]
local verb, id, asked = ARGV[1], ARGV[2], tonumber(ARGV[3])
local bounds = {tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])}
local MINUTE, HOUR = 60000000, 3600000000
local LOGS = {{minute, MINUTE}, {hour, HOUR}, {minute, MINUTE}}

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

local function whole(number)
  return string.format('%.0f', number)
end

local function tokens_of(which)
  return tonumber(redis.call('HGET', tokens, which) or '0')
end

local function recount(which, counted)
  redis.call('HINCRBY', tokens, 'sum', whole(counted - tokens_of(which)))
  redis.call('HSET', tokens, which, whole(counted))
end

local function forget(which)
  if redis.call('HEXISTS', tokens, which) == 1 then
    recount(which, 0)
    redis.call('HDEL', tokens, which)
  end
end

local function expire()
  local left = redis.call('ZRANGEBYSCORE', minute, '-inf', whole(now - MINUTE))
  for _, which in ipairs(left) do
    forget(which)
    redis.call('ZREM', minute, which)
  end
  redis.call('ZREMRANGEBYSCORE', hour, '-inf', whole(now - HOUR))
end

local function used(which)
  if which == 3 then
    return tokens_of('sum')
  end
  return redis.call('ZCARD', LOGS[which][1])
end

local function until_left(which, rank)
  local log, window = LOGS[which][1], LOGS[which][2]
  local entry = redis.call('ZRANGE', log, rank, rank, 'WITHSCORES')
  return entry[2] and tonumber(entry[2]) + window - now or window
end

local function until_free(which, excess)
  if which < 3 then
    return until_left(which, excess - 1)
  end
  for rank, each in ipairs(redis.call('ZRANGE', minute, 0, -1)) do
    excess = excess - tokens_of(each)
    if excess <= 0 then
      return until_left(which, rank - 1)
    end
  end
  return MINUTE
end

local function reserve()
  local wait, full = -1, 0
  for which, bound in ipairs(bounds) do
    local excess = used(which) + (which == 3 and asked or 1) - bound
    if bound > 0 and excess > 0 then
      local free = until_free(which, excess)
      if free > wait then
        wait, full = free, which
      end
    end
  end
  if full > 0 then
    return {0, wait, full}
  end
  redis.call('ZADD', minute, whole(now), id)
  redis.call('PEXPIRE', minute, MINUTE / 1000)
  recount(id, asked)
  redis.call('PEXPIRE', tokens, MINUTE / 1000)
  if bounds[2] > 0 then
    redis.call('ZADD', hour, whole(now), id)
    redis.call('PEXPIRE', hour, HOUR / 1000)
  end
  return {1, now}
end

local function settle()
  if redis.call('HEXISTS', tokens, id) == 1 then
    recount(id, asked)
  end
  return {1, now}
end

local function refund()
  forget(id)
  redis.call('ZREM', minute, id)
  redis.call('ZREM', hour, id)
  return {1, now}
end

local function standings()
  local told = {}
  for which, bound in ipairs(bounds) do
    if bound > 0 then
      table.insert(told, used(which))
      table.insert(told, until_left(which, 0))
    end
  end
  return told
end

expire()
return ({reserve = reserve, settle = settle, refund = refund, standings = standings})[verb]()

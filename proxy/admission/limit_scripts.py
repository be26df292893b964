"""Lua scripts of the shared limits. Redis runs each without interruption, and all use the clock of Redis.

A limit is a window: a hash with `reserved`, the sum of what is reserved now, and what was spent in each grain of a
second, under the grain's end in milliseconds. Beside it is a sorted set of leases `ID:AMOUNT` by their ends. A lease
that has ended is freed, because its proxy no longer renews it. `ID:done` marks a lease that was settled, so that a
repeated or late call does not change it again.

A limit of running requests is a window too: each request reserves 1 and spends nothing.
"""

from __future__ import annotations

from typing import Final

_COMMON: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function free_ended(window, leases)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now)) do
    local amount = tonumber(string.match(member, ':(%d+)$'))
    if amount then redis.call('HINCRBY', window, 'reserved', 0 - amount) end
    redis.call('ZREM', leases, member)
  end
end

local function reserved(window)
  return math.max(0, tonumber(redis.call('HGET', window, 'reserved') or 0))
end

local function spent(window, span_ms)
  local total, grains = 0, {}
  local fields = redis.call('HGETALL', window)
  for i = 1, #fields, 2 do
    local finish = tonumber(fields[i])
    if finish and finish <= now - span_ms then
      redis.call('HDEL', window, fields[i])
    elseif finish then
      local tokens = tonumber(fields[i + 1])
      total = total + tokens
      table.insert(grains, {finish, tokens})
    end
  end
  return total, grains
end

local function keep(window, leases, keep_ms)
  redis.call('PEXPIRE', window, keep_ms)
  redis.call('PEXPIRE', leases, keep_ms)
end

local function take(window, leases, id, amount, lease_ms, keep_ms)
  if redis.call('ZSCORE', leases, id .. ':done') then return end
  if redis.call('ZADD', leases, now + lease_ms, id .. ':' .. amount) == 1 then
    redis.call('HINCRBY', window, 'reserved', amount)
  end
  keep(window, leases, keep_ms)
end
"""

RESERVE: Final = (
    _COMMON
    + """
-- KEYS: window and leases of each limit. ARGV: id, lease, span, grain, keep (ms), then cap and amount of each limit.
-- Returns {0}, or {number of the limit that lacks room longest, ms until there is room, spent, reserved}.
local id, lease_ms, span_ms, grain_ms, keep_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local refusal = {0, -1}
for i = 1, #KEYS / 2 do
  local window, cap, amount = KEYS[2 * i - 1], tonumber(ARGV[4 + 2 * i]), tonumber(ARGV[5 + 2 * i])
  free_ended(window, KEYS[2 * i])
  local used, grains = spent(window, span_ms)
  local held = reserved(window)
  local missing = amount - math.max(0, cap - used - held)
  if missing > 0 then
    local wait = grain_ms
    table.sort(grains, function(a, b) return a[1] < b[1] end)
    for _, grain in ipairs(grains) do
      missing = missing - grain[2]
      if missing <= 0 then
        wait = math.max(0, grain[1] + span_ms - now)
        break
      end
    end
    if wait > refusal[2] then refusal = {i, wait, used, held} end
  end
end
if refusal[1] > 0 then return refusal end
for i = 1, #KEYS / 2 do
  local window, leases, amount = KEYS[2 * i - 1], KEYS[2 * i], ARGV[5 + 2 * i]
  take(window, leases, id, amount, lease_ms, keep_ms)
end
return {0}
"""
)

ENTER: Final = (
    _COMMON
    + """
-- KEYS: window, leases, waiters by arrival, waiters by the time until which they count.
-- ARGV: id, lease, keep (ms), limit, name of the waiting proxy (empty if it does not wait), ms for which it counts.
-- Returns 1 if a place is taken. Proxies that wait take turns in the order of their arrival.
local id, lease_ms, keep_ms, limit, waiter, patience_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local window, leases, arrivals, patience = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
free_ended(window, leases)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', patience, '-inf', now)) do
  redis.call('ZREM', arrivals, gone)
  redis.call('ZREM', patience, gone)
end
local ahead = redis.call('ZRANK', arrivals, waiter) or redis.call('ZCARD', arrivals)
if reserved(window) + ahead < limit then
  redis.call('ZREM', arrivals, waiter)
  redis.call('ZREM', patience, waiter)
  take(window, leases, id, 1, lease_ms, keep_ms)
  return 1
end
if waiter ~= '' then
  redis.call('ZADD', arrivals, 'NX', now, waiter)
  redis.call('ZADD', patience, now + patience_ms, waiter)
  keep(arrivals, patience, keep_ms)
end
return 0
"""
)

SETTLE: Final = (
    _COMMON
    + """
-- KEYS: window and leases of each settlement. ARGV: grain, keep (ms), then id, amount and cost of each settlement.
local grain_ms, keep_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local grain = tostring((math.floor(now / grain_ms) + 1) * grain_ms)
for i = 1, #KEYS / 2 do
  local window, leases = KEYS[2 * i - 1], KEYS[2 * i]
  local id, amount, cost = ARGV[3 * i], ARGV[3 * i + 1], tonumber(ARGV[3 * i + 2])
  free_ended(window, leases)
  if not redis.call('ZSCORE', leases, id .. ':done') then
    if redis.call('ZREM', leases, id .. ':' .. amount) == 1 then
      redis.call('HINCRBY', window, 'reserved', 0 - amount)
    end
    if cost > 0 then redis.call('HINCRBY', window, grain, cost) end
    redis.call('ZADD', leases, now + keep_ms, id .. ':done')
    keep(window, leases, keep_ms)
  end
end
"""
)

RENEW: Final = (
    _COMMON
    + """
-- KEYS: window and leases of each lease. ARGV: lease, keep (ms), then id and amount of each lease.
-- A lease that is missing is taken again: its request still runs, and Redis may have lost its data.
local lease_ms, keep_ms = ARGV[1], ARGV[2]
for i = 1, #KEYS / 2 do
  local window, leases, id, amount = KEYS[2 * i - 1], KEYS[2 * i], ARGV[1 + 2 * i], ARGV[2 + 2 * i]
  free_ended(window, leases)
  take(window, leases, id, amount, lease_ms, keep_ms)
end
"""
)

USAGE: Final = (
    _COMMON
    + """
-- KEYS: window and leases of each limit. ARGV: span (ms). Returns spent and reserved of each limit.
local usage = {}
for i = 1, #KEYS / 2 do
  free_ended(KEYS[2 * i - 1], KEYS[2 * i])
  table.insert(usage, (spent(KEYS[2 * i - 1], tonumber(ARGV[1]))))
  table.insert(usage, reserved(KEYS[2 * i - 1]))
end
return usage
"""
)

SCRIPTS: Final = {"reserve": RESERVE, "enter": ENTER, "settle": SETTLE, "renew": RENEW, "usage": USAGE}
"""The scripts by name."""

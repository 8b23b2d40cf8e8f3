-- The log is written by the database: whoever changes items, through ItemCache or not, takes revisions and appends
-- log rows in the same transaction.
--
-- Statement triggers do it, because only they know what really changed: a row trigger BEFORE the change also fires
-- for an INSERT … ON CONFLICT DO NOTHING that then inserts nothing, and a revision taken there would be a hole in the
-- log. They see the old and the new image, so a changed id, tenant or tag invalidates both sides.
-- They do not fire for rows that logical replication applies: items must not be the target of a subscription.

-- The first revision of the current timeline, minus one. After a failover that lost commits the timeline is a new one,
-- and every revision from then on is greater than every lost one.
CREATE FUNCTION itemcache_timeline_start() RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint << 40
$$;

-- Takes `amount` consecutive revisions of a tenant for this transaction and returns the last. The tenant's row stays
-- locked until the end of the transaction, so revisions are in the order of commits and leave no gap; whoever takes
-- those of several tenants does so in the order of their names.
--
-- Listeners are told "<last revision> <tenant>", but at most once in 250 ms for a tenant: PostgreSQL lets the
-- transactions that notify commit only one after the other, whatever their tenants. Whoever was told asks by itself
-- for as long as more may follow. (A clock that was set back does not silence anybody.)
CREATE FUNCTION itemcache_take_revisions(of_tenant text, amount bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  timeline_start bigint := itemcache_timeline_start();
  moment timestamptz := clock_timestamp();
  notified timestamptz;
  last bigint;
BEGIN
  -- A revision that was handed out must not be lost in a crash. A setting that waits for more than "on" is kept.
  IF current_setting('synchronous_commit') IN ('off', 'local', 'remote_write') THEN
    PERFORM set_config('synchronous_commit', 'on', true);
  END IF;
  INSERT INTO tenants AS t (name, revision, notified_at) VALUES (of_tenant, timeline_start + amount, moment)
    ON CONFLICT (name) DO UPDATE SET
      revision = greatest(t.revision, timeline_start) + amount,
      notified_at = CASE WHEN moment - t.notified_at BETWEEN '-1 s' AND '250 ms' THEN t.notified_at ELSE moment END
    RETURNING revision, notified_at INTO last, notified;
  IF notified = moment THEN
    PERFORM pg_notify('itemcache_invalidations', last || ' ' || of_tenant);
  END IF;
  RETURN last;
END
$$;

CREATE FUNCTION itemcache_writer() RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(current_setting('itemcache.writer', true), '')
$$;

-- Appends an explicit invalidation, one row for each 1,000 keys (ids or tags; ignored for TENANT_INVALIDATED), and
-- returns the last revision:
--   SELECT itemcache_invalidate('default', 'KEYS_INVALIDATED', 'EXPIRE', ARRAY['1', '2'])
CREATE FUNCTION itemcache_invalidate(of_tenant text, kind text, mode text, keys text[] DEFAULT '{}')
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  amount bigint := greatest(1, (cardinality(keys) + 999) / 1000);
  last bigint;
BEGIN
  IF kind NOT IN ('KEYS_INVALIDATED', 'TAGS_INVALIDATED', 'TENANT_INVALIDATED') THEN
    RAISE EXCEPTION 'kind must be KEYS_INVALIDATED, TAGS_INVALIDATED or TENANT_INVALIDATED, got %', kind
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF kind = 'TENANT_INVALIDATED' THEN
    keys := '{}';
    amount := 1;
  ELSIF cardinality(keys) = 0 OR array_position(keys, NULL) IS NOT NULL THEN
    RAISE EXCEPTION '% needs keys that are not null', kind USING ERRCODE = 'invalid_parameter_value';
  END IF;
  last := itemcache_take_revisions(of_tenant, amount);
  INSERT INTO invalidations (tenant, revision, kind, mode, ids, tags, writer)
    SELECT of_tenant, last - amount + n, kind, mode,
      CASE kind WHEN 'KEYS_INVALIDATED' THEN keys[n * 1000 - 999 : n * 1000] ELSE '{}' END,
      CASE kind WHEN 'TAGS_INVALIDATED' THEN keys[n * 1000 - 999 : n * 1000] ELSE '{}' END,
      itemcache_writer()
    FROM generate_series(1, amount::integer) AS n;
  RETURN last;
END
$$;

-- Logs one statement that changed items. First it collects the keys whose state differs (parallel arrays; an array
-- of tags travels as its text, since arrays of arrays cannot be ragged), then it logs them, 1,000 to a row.
--
-- Its plans are kept for the session, and the next statement may be a thousand times larger or smaller. So nothing in
-- here depends on estimates: a FULL JOIN is never a nested loop, and tables are only reached through their keys.
CREATE FUNCTION itemcache_log_items() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
  tenants_changed text[];
  ids_changed text[];
  kinds text[];
  tags_before text[];
  tags_after text[];
  floor_tags text[];
  claims boolean[];
  batch record;
  current_tenant text;
  next_revision bigint;
BEGIN
  IF TG_OP = 'INSERT' THEN
    SELECT array_agg(tenant), array_agg(id), array_agg(kind),
        array_agg('{}'::text), array_agg(tags::text), array_agg((tags || category)::text)
      INTO tenants_changed, ids_changed, kinds, tags_before, tags_after, floor_tags
      FROM (
        SELECT tenant, id,
          CASE WHEN deleted THEN 'DELETED' ELSE 'UPSERTED' END AS kind,
          CASE WHEN deleted THEN '{}' ELSE tags END AS tags,
          CASE WHEN deleted THEN '' ELSE category END AS category
        FROM new_rows
      ) AS changed;
  ELSIF TG_OP = 'DELETE' THEN
    -- One statement may delete an item and insert it again (WITH … DELETE … INSERT): then it is not gone.
    SELECT array_agg(tenant), array_agg(id), array_agg(kind),
        array_agg(tags::text), array_agg('{}'::text), array_agg((tags || category)::text)
      INTO tenants_changed, ids_changed, kinds, tags_before, tags_after, floor_tags
      FROM (
        SELECT o.tenant, o.id,
          CASE WHEN (SELECT NOT i.deleted FROM items i WHERE i.tenant = o.tenant AND i.id = o.id)
            THEN 'UPSERTED' ELSE 'DELETED' END AS kind,
          CASE WHEN o.deleted THEN '{}' ELSE o.tags END AS tags,
          CASE WHEN o.deleted THEN '' ELSE o.category END AS category
        FROM old_rows o
      ) AS changed;
  ELSE
    -- What another statement would read at each key, before and after. `revision` is compared so that one written
    -- by hand is put right; `update_time` is not.
    SELECT array_agg(tenant), array_agg(id), array_agg(kind),
        array_agg(before::text), array_agg(after::text), array_agg((before || after || categories)::text),
        array_agg(claimed)
      INTO tenants_changed, ids_changed, kinds, tags_before, tags_after, floor_tags, claims
      FROM (
        SELECT tenant, id,
          CASE WHEN n.deleted IS FALSE THEN 'UPSERTED' ELSE 'DELETED' END AS kind,
          CASE WHEN o.deleted IS FALSE THEN o.tags ELSE '{}' END AS before,
          CASE WHEN n.deleted IS FALSE THEN n.tags ELSE '{}' END AS after,
          ARRAY[
            CASE WHEN o.deleted IS FALSE THEN o.category ELSE '' END,
            CASE WHEN n.deleted IS FALSE THEN n.category ELSE '' END
          ] AS categories,
          o.source = 'ORIGIN' AND n.source = 'ORIGIN'
            AND current_setting('itemcache.loading', true) IS DISTINCT FROM 'on' AS claimed
        FROM old_rows o FULL JOIN new_rows n USING (tenant, id)
        WHERE (o.id, o.title, o.description, o.category, o.image_uri, o.price_currency, o.price_units, o.price_nanos,
            o.rating_rate, o.rating_count, o.tags, o.attributes, o.source, o.deleted, o.create_time, o.revision)
          IS DISTINCT FROM
            (n.id, n.title, n.description, n.category, n.image_uri, n.price_currency, n.price_units, n.price_nanos,
            n.rating_rate, n.rating_count, n.tags, n.attributes, n.source, n.deleted, n.create_time, n.revision)
      ) AS changed;
  END IF;
  IF ids_changed IS NULL THEN
    RETURN NULL;
  END IF;

  -- The triggers do not fire for the UPDATE that writes the revisions back.
  PERFORM set_config('itemcache.stamping', 'on', true);
  FOR batch IN
    SELECT tenant, kind, array_agg(DISTINCT id) AS ids,
      coalesce(array_agg(DISTINCT tag) FILTER (WHERE tag <> ''), '{}') AS tags,
      array_agg(DISTINCT id) FILTER (WHERE claimed) AS claimed,
      count(*) OVER (PARTITION BY tenant) AS batches
    FROM (
      SELECT tenant COLLATE "C" AS tenant, id COLLATE "C" AS id, kind, floors, claimed,
        (row_number() OVER (PARTITION BY tenant COLLATE "C", kind ORDER BY id COLLATE "C") - 1) / 1000 AS nth
      FROM unnest(tenants_changed, ids_changed, kinds, floor_tags, claims) AS c (tenant, id, kind, floors, claimed)
    ) AS numbered
    LEFT JOIN LATERAL unnest(floors::text[]) AS tag ON true
    GROUP BY tenant, kind, nth
    ORDER BY tenant, kind, nth
  LOOP
    IF batch.tenant IS DISTINCT FROM current_tenant THEN
      current_tenant := batch.tenant;
      next_revision := itemcache_take_revisions(batch.tenant, batch.batches) - batch.batches;
    END IF;
    next_revision := next_revision + 1;
    INSERT INTO invalidations (tenant, revision, kind, mode, ids, tags, writer)
      VALUES (batch.tenant, next_revision, batch.kind, CASE batch.kind WHEN 'DELETED' THEN 'REMOVE' ELSE 'EXPIRE' END,
        batch.ids, batch.tags, itemcache_writer());
    UPDATE items SET revision = next_revision, update_time = now()
      WHERE tenant = batch.tenant AND id = ANY (batch.ids);
    IF batch.claimed IS NOT NULL THEN
      UPDATE items SET source = 'LOCAL' WHERE tenant = batch.tenant AND id = ANY (batch.claimed);
    END IF;
  END LOOP;
  PERFORM set_config('itemcache.stamping', '', true);

  IF tags_before <> tags_after THEN
    DELETE FROM item_tags g
      USING unnest(tenants_changed, ids_changed, tags_before, tags_after) AS c (tenant, id, before, after),
        unnest(c.before::text[]) AS former
      WHERE c.before <> c.after AND former <> ALL (c.after::text[])
        AND g.tenant = c.tenant AND g.tag = former AND g.id = c.id;
    INSERT INTO item_tags (tenant, tag, id)
      SELECT c.tenant, tag, c.id
      FROM unnest(tenants_changed, ids_changed, tags_before, tags_after) AS c (tenant, id, before, after),
        unnest(c.after::text[]) AS tag
      WHERE c.before <> c.after
      ON CONFLICT DO NOTHING;
  END IF;
  RETURN NULL;
END
$$;

-- Nothing is known of the rows that were there, so every tenant forgets everything.
CREATE FUNCTION itemcache_log_truncate() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  tenant text;
BEGIN
  FOR tenant IN SELECT name FROM tenants ORDER BY name LOOP
    PERFORM itemcache_invalidate(tenant, 'TENANT_INVALIDATED', 'REMOVE');
  END LOOP;
  TRUNCATE item_tags;
  RETURN NULL;
END
$$;

CREATE FUNCTION itemcache_guard_tenants() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'a tenant is never deleted or renamed, and its revision never falls'
    USING ERRCODE = 'restrict_violation', HINT = 'Delete its items instead.';
END
$$;

CREATE TRIGGER items_log_insert AFTER INSERT ON items
  REFERENCING NEW TABLE AS new_rows
  FOR EACH STATEMENT EXECUTE FUNCTION itemcache_log_items();
CREATE TRIGGER items_log_update AFTER UPDATE ON items
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
  FOR EACH STATEMENT WHEN (current_setting('itemcache.stamping', true) IS DISTINCT FROM 'on')
  EXECUTE FUNCTION itemcache_log_items();
CREATE TRIGGER items_log_delete AFTER DELETE ON items
  REFERENCING OLD TABLE AS old_rows
  FOR EACH STATEMENT EXECUTE FUNCTION itemcache_log_items();
CREATE TRIGGER items_log_truncate AFTER TRUNCATE ON items
  FOR EACH STATEMENT EXECUTE FUNCTION itemcache_log_truncate();
CREATE TRIGGER tenants_guard_update BEFORE UPDATE ON tenants
  FOR EACH ROW WHEN (NEW.revision <= OLD.revision OR NEW.name <> OLD.name)
  EXECUTE FUNCTION itemcache_guard_tenants();
CREATE TRIGGER tenants_guard_delete BEFORE DELETE ON tenants
  FOR EACH ROW EXECUTE FUNCTION itemcache_guard_tenants();
CREATE TRIGGER tenants_guard_truncate BEFORE TRUNCATE ON tenants
  FOR EACH STATEMENT EXECUTE FUNCTION itemcache_guard_tenants();

-- ALWAYS: also for sessions that switch ordinary triggers off (session_replication_role = replica).
ALTER TABLE items ENABLE ALWAYS TRIGGER items_log_insert;
ALTER TABLE items ENABLE ALWAYS TRIGGER items_log_update;
ALTER TABLE items ENABLE ALWAYS TRIGGER items_log_delete;
ALTER TABLE items ENABLE ALWAYS TRIGGER items_log_truncate;
ALTER TABLE tenants ENABLE ALWAYS TRIGGER tenants_guard_update;
ALTER TABLE tenants ENABLE ALWAYS TRIGGER tenants_guard_delete;
ALTER TABLE tenants ENABLE ALWAYS TRIGGER tenants_guard_truncate;

-- The functions find their tables whatever the caller's search_path is.
DO $$
DECLARE
  f regprocedure;
BEGIN
  FOR f IN
    SELECT oid FROM pg_proc
    WHERE pronamespace = current_schema()::regnamespace AND proname LIKE 'itemcache\_%'
      AND proname NOT IN ('itemcache_timeline_start', 'itemcache_writer')
  LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', f, current_schema());
  END LOOP;
END
$$;

-- Replaces the content of items that are still as the caller knows them: one way to the database and back, one commit for all,
-- and nobody waits for the caller while the tenant's row is locked.
--
-- `writes` is an array of objects, of different items and request ids:
--   id, revision                what is known of the item
--   known_tags                  its tags
--   former_tags                 its tags and its category
--   writer, request_id, fingerprint   '' where there is none
--   title, description, …       the new content, by the columns' names
--
-- Its plans are kept for the session, and the tables may grow: so rows are looked up one by one, by their keys.
--
-- What changes is logged here and not by the trigger on items, which would give all of it one revision: here each write has its own.
--
-- Returns what is there now, as of the tenant's revision. An item for which nothing was done is missing: it is at another
-- revision, or its request id was used before. All are missing when the server is older than the caller has seen, or the
-- session is another tenant's. Whoever misses one finds out by locking the row.
CREATE FUNCTION itemcache_replace_known(of_tenant text, known_timeline bigint, writes jsonb)
RETURNS TABLE (as_of bigint, item items) LANGUAGE plpgsql AS $$
DECLARE
  claiming text[];
  claimed text[];
  replacing text[];
  changing text[];
  before_first bigint;
  now_at bigint;
  lock_timeout text;
  one record;
BEGIN
  IF itemcache_timeline_start() < known_timeline
    OR current_setting('itemcache.tenant', true) IS DISTINCT FROM of_tenant THEN
    RETURN;
  END IF;

  -- Whoever writes claims its request id, then locks its items, each in order, then takes revisions: so that no two of
  -- these wait for each other for ever. What others hold is not waited for, or hardly: it must not hold up the rest.
  SELECT array_agg(w ->> 'request_id') INTO claiming
    FROM jsonb_array_elements(writes) AS w WHERE w ->> 'request_id' <> '';
  IF claiming IS NOT NULL THEN
    lock_timeout := current_setting('lock_timeout');
    BEGIN
      PERFORM set_config('lock_timeout', '20ms', true);
      WITH inserted AS (
        INSERT INTO requests (tenant, request_id, fingerprint)
          SELECT of_tenant, w.request_id, w.fingerprint
          FROM jsonb_to_recordset(writes) AS w (request_id text, fingerprint text)
          WHERE w.request_id <> ''
          ORDER BY w.request_id COLLATE "C"
          ON CONFLICT DO NOTHING
          RETURNING request_id
      )
      SELECT coalesce(array_agg(request_id), '{}') INTO claimed FROM inserted;
    EXCEPTION WHEN lock_not_available THEN
      -- A write with one of these ids is in progress.
      RETURN;
    END;
    PERFORM set_config('lock_timeout', lock_timeout, true);
  END IF;
  -- A write that changes nothing leaves no trace.
  SELECT coalesce(array_agg(i.id), '{}'), array_agg(i.id ORDER BY i.id) FILTER (
      WHERE (i.title, i.description, i.category, i.image_uri, i.price_currency, i.price_units, i.price_nanos, i.rating_rate,
          i.rating_count, i.tags, i.attributes)
        IS DISTINCT FROM (x.title, x.description, x.category, x.image_uri, x.price_currency, x.price_units, x.price_nanos,
          x.rating_rate, x.rating_count, x.tags, x.attributes)
    ) INTO replacing, changing
    FROM jsonb_to_recordset(writes) AS x (
      id text, revision bigint, request_id text, title text, description text, category text, image_uri text,
      price_currency text, price_units bigint, price_nanos integer, rating_rate double precision, rating_count bigint,
      tags text[] COLLATE "C", attributes jsonb
    )
    CROSS JOIN LATERAL (SELECT * FROM items WHERE tenant = of_tenant AND id = x.id FOR UPDATE SKIP LOCKED) AS i
    WHERE i.revision = x.revision AND NOT i.deleted AND (x.request_id = '' OR x.request_id = ANY (claimed));

  IF changing IS NOT NULL THEN
    before_first := itemcache_take_revisions(of_tenant, cardinality(changing)) - cardinality(changing);
    PERFORM set_config('itemcache.stamping', 'on', true);
    FOR one IN
      SELECT x.*, before_first + array_position(changing, x.id) AS next FROM jsonb_to_recordset(writes) AS x (
        id text, writer text, known_tags text[], former_tags text[], title text, description text, category text,
        image_uri text, price_currency text, price_units bigint, price_nanos integer, rating_rate double precision,
        rating_count bigint, tags text[], attributes jsonb
      ) WHERE x.id = ANY (changing)
    LOOP
      UPDATE items
        SET title = one.title, description = one.description, category = one.category, image_uri = one.image_uri,
          price_currency = one.price_currency, price_units = one.price_units, price_nanos = one.price_nanos,
          rating_rate = one.rating_rate, rating_count = one.rating_count, tags = one.tags, attributes = one.attributes,
          source = 'LOCAL', revision = one.next, update_time = now()
        WHERE tenant = of_tenant AND id = one.id;
      INSERT INTO invalidations (tenant, revision, kind, mode, ids, tags, writer)
        VALUES (of_tenant, one.next, 'UPSERTED', 'EXPIRE', ARRAY[one.id], ARRAY(
          SELECT DISTINCT tag COLLATE "C" FROM unnest(one.former_tags || one.tags || one.category) AS tag WHERE tag <> '' ORDER BY 1
        ), one.writer);
      IF one.tags <> one.known_tags THEN
        DELETE FROM item_tags WHERE tenant = of_tenant AND id = one.id
          AND tag = ANY (ARRAY(SELECT unnest(one.known_tags) EXCEPT SELECT unnest(one.tags)));
        INSERT INTO item_tags (tenant, tag, id) SELECT of_tenant, tag, one.id FROM unnest(one.tags) AS tag ON CONFLICT DO NOTHING;
      END IF;
    END LOOP;
    PERFORM set_config('itemcache.stamping', '', true);
  END IF;

  -- By statements of their own, whose snapshots have the revisions that were just taken.
  SELECT greatest(t.revision, s.timeline) INTO now_at
    FROM (SELECT itemcache_timeline_start() AS timeline) AS s LEFT JOIN tenants t ON t.name = of_tenant;
  IF claiming IS NOT NULL THEN
    FOR one IN
      SELECT x.* FROM jsonb_to_recordset(writes) AS x (id text, request_id text, former_tags text[])
      WHERE x.request_id = ANY (claimed)
    LOOP
      IF one.id = ANY (replacing) THEN
        UPDATE requests r SET revision = i.revision, state = 'present', id = i.id, as_of = now_at, item_revision = i.revision,
            former_tags = one.former_tags, outcome = to_jsonb(i)
          FROM items i
          WHERE r.tenant = of_tenant AND r.request_id = one.request_id AND i.tenant = of_tenant AND i.id = one.id;
      ELSE
        DELETE FROM requests r WHERE r.tenant = of_tenant AND r.request_id = one.request_id;
      END IF;
    END LOOP;
  END IF;
  RETURN QUERY
    SELECT now_at, found.i FROM unnest(replacing) AS x (id)
    CROSS JOIN LATERAL (SELECT i FROM items i WHERE i.tenant = of_tenant AND i.id = x.id OFFSET 0) AS found;
END
$$;

-- The item after the write, where `item` does not hold it encoded.
ALTER TABLE requests ADD COLUMN outcome jsonb;

-- The function finds its tables whatever the caller's search_path is.
DO $$
BEGIN
  EXECUTE format('ALTER FUNCTION itemcache_replace_known SET search_path = %I, pg_temp', current_schema());
END
$$;

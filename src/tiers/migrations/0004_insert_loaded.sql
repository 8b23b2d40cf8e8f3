-- Inserts what the origin knows of items (an array of objects with the columns' names) where nothing is, and returns what
-- is there now, with the tenant's revision: one statement for the service, and one way to the database and back.
--
-- What is there is read by a statement of its own: its snapshot has the revision that the triggers have just taken, and
-- what others have inserted meanwhile. `item` is null where there is nothing all the same.
CREATE FUNCTION itemcache_insert_loaded(of_tenant text, drafts jsonb)
RETURNS TABLE (as_of bigint, item items) LANGUAGE plpgsql AS $$
BEGIN
  -- In the order of ids, so that two of these never wait for each other.
  INSERT INTO items (tenant, id, title, description, category, image_uri, price_currency, price_units, price_nanos,
      rating_rate, rating_count, tags, attributes, source)
    SELECT of_tenant, x.id, x.title, x.description, x.category, x.image_uri, x.price_currency, x.price_units,
      x.price_nanos, x.rating_rate, x.rating_count, x.tags, x.attributes, 'ORIGIN'
    FROM jsonb_to_recordset(drafts) AS x (
      id text, title text, description text, category text COLLATE "C", image_uri text,
      price_currency text, price_units bigint, price_nanos integer, rating_rate double precision, rating_count bigint,
      tags text[] COLLATE "C", attributes jsonb
    )
    ORDER BY x.id COLLATE "C"
    ON CONFLICT ON CONSTRAINT items_pkey DO NOTHING;
  RETURN QUERY
    SELECT greatest(t.revision, s.timeline), i
    FROM (SELECT itemcache_timeline_start() AS timeline) AS s
    LEFT JOIN tenants t ON t.name = of_tenant
    LEFT JOIN items i ON i.tenant = t.name
      AND i.id = ANY (ARRAY(SELECT draft ->> 'id' FROM jsonb_array_elements(drafts) AS draft));
END
$$;

-- It finds its tables whatever the caller's search_path is.
DO $$
BEGIN
  EXECUTE format('ALTER FUNCTION itemcache_insert_loaded SET search_path = %I, pg_temp', current_schema());
END
$$;

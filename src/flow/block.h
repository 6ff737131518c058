/*-------------------------------------------------------------------------
 *
 * block.h
 *	  Items are stored in blocks of neighbours.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_BLOCK_H
#define REDRIVE_BLOCK_H

#include "postgres.h"

/* A block ends before it has more than this; two fill a page. */
#define BLOCK_BYTES 3800
#define BLOCK_ITEMS 128

/* Packs items into blocks. */
typedef struct BlockWriter
{
	int16		part;
	int64		batch_id;
	int64		first_no;		/* of the block being filled */
	int			items;
	Size		bytes;
	int64		keys_total;
	bool		has_key;		/* in the block being filled */
	Datum		payloads[BLOCK_ITEMS];
	Datum		keys[BLOCK_ITEMS];
	bool		key_nulls[BLOCK_ITEMS];
} BlockWriter;

extern BlockWriter *redrive_block_writer(int16 part, int64 batch_id, int64 items_before);
extern void redrive_flush_block(BlockWriter *writer);
extern void redrive_check_key(text * key, const char *what);
extern void redrive_add_item(BlockWriter *writer, Datum payload, Datum key, bool key_isnull);
extern void redrive_lock_keys(BlockWriter *writer, int32 handler_id, int64 first_no);

#endif							/* REDRIVE_BLOCK_H */

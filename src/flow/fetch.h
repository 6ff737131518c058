/*-------------------------------------------------------------------------
 *
 * fetch.h
 *	  Read the items of a chunk, a page at a time.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_FETCH_H
#define REDRIVE_FETCH_H

#include "flow/batch.h"

extern bool redrive_fetch_page(RedriveChunk *chunk);

#endif							/* REDRIVE_FETCH_H */
